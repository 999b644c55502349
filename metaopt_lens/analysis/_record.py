"""What a comparison needs from the runs of one demonstration set, on the CPU, a query a row."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis._matrices import Factors, effective_rank, frobenius_cosine, principal_angles
from metaopt_lens.analysis._similarity import difference
from metaopt_lens.dual import at_least_float32
from metaopt_lens.finetuning import UpdatedMemory, WeightUpdate, delta_w_ft, updated_memory
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs import (
    SETTINGS,
    Keep,
    Run,
    Runs,
    attention_output,
    delta_w_icl,
    demo_scores,
    own_scores,
    record_batches,
    scaled_queries,
    softmax_parts,
)

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


@dataclass(frozen=True)
class SetRecord:
    """Quantities at the last token of every query of one demonstration set.

    Attributes:
        z_*: head outputs in context (icl), zero-shot (zs), finetuned zero-shot (ft), and the position-matched zero-shot
            runs of base (zsm) and finetuned (ftm) model.
        direct, meta_gradient: the exact form's direct update and ``sum_D a v``.
        linear_icl, linear_ft: ``dW_ICL q`` and ``dW_FT q`` with q of the in-context run.
        hidden_*: attention outputs after W_O and b_O.
        scores_*: scores before the softmax over the query's own tokens, NaN behind a query's end.
        frobenius: cosine of the matrices dW_ICL and dW_FT; subspace_left, subspace_right: mean squared cosine of the
            principal angles of their leading singular subspaces (NaN where a rank is too small), and *_rotated the same
            after a random rotation of what finetuning changed; rank_icl, rank_ft:
            effective ranks.
        context_scores: scores to the demonstrations' tokens (no separators), summed over heads.
        queries_ft: query vectors of the finetuned run before rotary, times the score scale, heads side by side.
        mass: attention mass on the demonstrations.
        lengths: tokens of each query.
        eps: rounding unit of the dtype that the model ran in, at least float32's: hosts make rotary tables in float32
            whatever the weights are.
    """

    z_icl: Float[Tensor, "query layer head d_head"]
    z_zs: Float[Tensor, "query layer head d_head"]
    z_ft: Float[Tensor, "query layer head d_head"]
    z_zsm: Float[Tensor, "query layer head d_head"]
    z_ftm: Float[Tensor, "query layer head d_head"]
    direct: Float[Tensor, "query layer head d_head"]
    meta_gradient: Float[Tensor, "query layer head d_head"]
    linear_icl: Float[Tensor, "query layer head d_head"]
    linear_ft: Float[Tensor, "query layer head d_head"]
    hidden_icl: Float[Tensor, "query layer d_model"]
    hidden_zs: Float[Tensor, "query layer d_model"]
    hidden_ft: Float[Tensor, "query layer d_model"]
    scores_icl: Float[Tensor, "query layer head pos"]
    scores_zs: Float[Tensor, "query layer head pos"]
    scores_ft: Float[Tensor, "query layer head pos"]
    frobenius: Float[Tensor, "query layer head"]
    subspace_left: Float[Tensor, "query layer head"]
    subspace_right: Float[Tensor, "query layer head"]
    subspace_left_rotated: Float[Tensor, "query layer head"]
    subspace_right_rotated: Float[Tensor, "query layer head"]
    rank_icl: Float[Tensor, "query layer head"]
    rank_ft: Float[Tensor, "query layer head"]
    context_scores: Float[Tensor, "query layer src"]
    queries_ft: Float[Tensor, "query layer d_q"]
    mass: Float[Tensor, "query layer head"]
    lengths: Int[Tensor, " query"]
    eps: Float[Tensor, " query"]

    @property
    def rounding(self) -> float:
        """`eps`, which is one for all queries of a set."""
        return float(self.eps[0])


def record_set(
    model: LensModel,
    tokenized: Sequence[TokenizedPrompt],
    update: WeightUpdate,
    *,
    subspace_dim: int,
    batch_size: int | None = None,
) -> SetRecord:
    """Run every setting over queries that share their demonstrations; the demonstrations are run once per model."""
    rows: dict[int, dict[str, Tensor]] = {}
    for indices, batch in record_batches(
        model, tokenized, settings=SETTINGS, update=update, keep=Keep(raw_q=True), batch_size=batch_size
    ):
        memories = updated_memory(model, update, [runs.icl for runs in batch])
        for index, runs, memory in zip(indices, batch, memories, strict=True):
            row = _attention(model, runs, update) | _linear(runs.icl, memory, subspace_dim)
            rows[index] = {name: _kept(t) for name, t in row.items()}
            rows[index]["eps"] = torch.tensor(
                max(torch.finfo(dtype).eps for dtype in (runs.icl.z.dtype, torch.float32))
            )
    return _stack([rows[index] for index in range(len(tokenized))], max(len(t.query) for t in tokenized))


def _kept(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor.detach()).cpu()


def _stack(rows: list[dict[str, Tensor]], longest: int) -> SetRecord:
    stacked = {"lengths": torch.tensor([row["scores_zs"].shape[-1] for row in rows])}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if name.startswith("scores_"):
            tensors = [torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=torch.nan) for t in tensors]
        stacked[name] = torch.stack(tensors)
    return SetRecord(**stacked)


def _attention(model: LensModel, runs: Runs, update: WeightUpdate) -> dict[str, Tensor]:
    """Outputs and scores of every setting at the last token, and the exact split of the in-context run."""
    parts = softmax_parts(runs.icl)
    row = {"mass": parts.mass, "direct": parts.update, "meta_gradient": parts.meta_gradient}
    names = {"icl": "icl", "zs": "zs", "ft": "ft", "zs_matched": "zsm", "ft_matched": "ftm"}
    row |= {f"z_{names[setting]}": run.z for setting, run in runs.items()}
    for name, run in (("icl", runs.icl), ("zs", runs.zs), ("ft", runs.ft)):
        w_o, b_o = (update.w_o, update.b_o) if name == "ft" else (None, None)
        row[f"hidden_{name}"] = attention_output(model, run, w_o=w_o, b_o=b_o)
        row[f"scores_{name}"] = own_scores(run)
    row["context_scores"] = demo_scores(runs.icl).sum(-2)
    row["queries_ft"] = scaled_queries(runs.ft)
    return {name: tensor[-1] for name, tensor in row.items()}


def _linear(icl: Run, memory: UpdatedMemory, subspace_dim: int) -> dict[str, Tensor]:
    """The linear form: both updates applied to the in-context query, and the matrices compared."""
    layers = []
    turned = _rotated(memory, seed=zlib.crc32(str(icl.tokens.ids).encode()))
    for layer, visible in enumerate(icl.visible[:, -1]):
        first, second, null = (
            delta_w_icl(icl, layer),
            *(delta_w_ft(m, layer, visible[~icl.in_demos]) for m in (memory, turned)),
        )
        group = icl.model.n_heads // icl.model.n_kv_heads
        row = {"linear_icl": _applied(first, icl.q[-1, layer]), "linear_ft": _applied(second, icl.q[-1, layer])}
        a, b = Factors(first.A, first.B), Factors(second.A, second.B)
        left, right = _mean_squared_cosines(a, b, subspace_dim)
        left_rotated, right_rotated = _mean_squared_cosines(a, Factors(null.A, null.B), subspace_dim)
        matrices = {
            "frobenius": frobenius_cosine(a, b),
            "subspace_left": left,
            "subspace_right": right,
            "subspace_left_rotated": left_rotated,
            "subspace_right_rotated": right_rotated,
            "rank_icl": effective_rank(a),
            "rank_ft": effective_rank(b),
        }
        row |= {name: t.repeat_interleave(group) for name, t in matrices.items()}
        changed = _changed(memory, layer, visible[~icl.in_demos]).repeat_interleave(group)  # else dW_FT is rounding
        for name in row.keys() - {"linear_icl", "rank_icl"}:
            row[name] = torch.where(changed[:, None] if row[name].ndim > 1 else changed, row[name], torch.nan)
        layers.append(row)
    return {name: torch.stack([row[name] for row in layers]) for name in layers[0]}


def _rotated(memory: UpdatedMemory, *, seed: int) -> UpdatedMemory:
    """The memory with what finetuning changed turned at random, one rotation for each layer and head.

    dW_FT also holds the model's own keys and values, which resemble those of the demonstrations whatever was learned: a
    random subspace would be too easy a null. A Gaussian update is as likely as any rotation of it.
    """
    generator = torch.Generator().manual_seed(seed)
    n_layers, _, n_heads, d_head = memory.k.shape

    def turned(new: Tensor, old: Tensor) -> Tensor:
        q, r = torch.linalg.qr(torch.randn(n_layers, n_heads, d_head, d_head, generator=generator, dtype=torch.float64))
        rotation = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).to(new)  # uniform: the signs of R are fixed
        return old + torch.einsum("lshd,lhde->lshe", new - old, rotation)

    return dataclasses.replace(
        memory, k_updated=turned(memory.k_updated, memory.k), v_updated=turned(memory.v_updated, memory.v)
    )


def _changed(memory: UpdatedMemory, layer: int, seen: Bool[Tensor, " src"]) -> Bool[Tensor, " kv_head"]:
    """Whether an update changed a head's keys or values by more than rounding."""
    pairs = ((memory.k_updated, memory.k), (memory.v_updated, memory.v))
    # [src kv_head d_head] -> [kv_head src * d_head]
    flat = [[t[layer][seen].transpose(0, 1).flatten(1) for t in pair] for pair in pairs]
    keys, values = (~difference(new, old).isnan().any(-1) for new, old in flat)
    return keys | values


def _applied(memory: FactoredMatrix, q: Float[Tensor, "head d_head"]) -> Float[Tensor, "head d_head"]:
    """A memory of every key-value head, applied to the queries of the heads that read it."""
    values, keys = (at_least_float32(t) for t in (memory.A, memory.B))  # [kv_head, d_head, src], [kv_head, src, d_head]
    grouped = at_least_float32(q).reshape(len(keys), -1, q.shape[-1])  # [kv_head, group, d_head]
    return torch.einsum("kds,ksc,kgc->kgd", values, keys, grouped).flatten(0, 1)


def _mean_squared_cosines(first: Factors, second: Factors, k: int) -> tuple[Tensor, Tensor]:
    """Overlap of the leading k-dimensional singular subspaces; NaN where a head's matrix has rank below k."""
    try:
        angles = principal_angles(first, second, k=k)
    except UndefinedMetricError:
        n_heads = len(first.left)
        if n_heads == 1:
            undefined = torch.full((1,), torch.nan, dtype=torch.float64, device=first.left.device)
            return undefined, undefined
        single = [_mean_squared_cosines(_head(first, i), _head(second, i), k) for i in range(n_heads)]
        return torch.cat([left for left, _ in single]), torch.cat([right for _, right in single])
    return angles.left.cos().square().mean(-1), angles.right.cos().square().mean(-1)


def _head(matrices: Factors, index: int) -> Factors:
    return Factors(matrices.left[index : index + 1], matrices.right[index : index + 1])
