"""dW_ICL and dW_FT of every head compared: by their action on the query, and as matrices (docs/theory.md, section 4)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens.analysis._matrices import Factors, overlap, spectrum
from metaopt_lens.analysis._similarity import difference
from metaopt_lens.dual import at_least_float32
from metaopt_lens.finetuning import UpdatedMemory, delta_w_ft
from metaopt_lens.runs import Run, delta_w_icl

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


@dataclass(frozen=True, eq=False)
class MatrixReadings:
    """Of some queries of one demonstration set, at their last token. NaN where finetuning changed neither keys nor
    values of a head by more than rounding.

    Attributes:
        linear_ft: ``dW_FT q`` with q of the in-context run.
        frobenius: cosine of the matrices dW_ICL and dW_FT.
        left, right: mean squared cosine of the principal angles of their leading singular subspaces, on the output and
            on the input side (NaN where a rank is too small).
        left_rotated, right_rotated: the same after a random rotation of what finetuning changed.
        rank_icl, rank_ft: effective ranks.
    """

    linear_ft: Float[Tensor, "query layer head d_head"]
    frobenius: Float[Tensor, "query layer head"]
    left: Float[Tensor, "query layer head"]
    right: Float[Tensor, "query layer head"]
    left_rotated: Float[Tensor, "query layer head"]
    right_rotated: Float[Tensor, "query layer head"]
    rank_icl: Float[Tensor, "query layer head"]
    rank_ft: Float[Tensor, "query layer head"]


def compare_matrices(icl: Sequence[Run], memories: Sequence[UpdatedMemory], *, subspace_dim: int) -> MatrixReadings:
    """Compare both matrices of every query, layer and head.

    Args:
        icl: in-context runs of queries behind the same demonstrations.
        memories: of the same queries.
        subspace_dim: dimension of the singular subspaces.
    """
    # What stands before the query is the same for all, and so is the rotation: it does not depend on the batch.
    tokens = icl[0].tokens
    seed = zlib.crc32(str(tokens.ids[: tokens.query.start]).encode())
    turned = rotated(memories, seed=seed)
    visible = [run.visible[:, -1] for run in icl]  # each [layer, src]
    layers = []
    for layer in range(len(icl[0].own_k)):
        seen = [v[layer] for v in visible]
        layers.append(_layer(icl, memories, turned, layer, seen, subspace_dim))
    names = [field.name for field in dataclasses.fields(MatrixReadings)]
    return MatrixReadings(**{name: torch.stack([row[name] for row in layers], dim=1) for name in names})


def _layer(
    icl: Sequence[Run],
    memories: Sequence[UpdatedMemory],
    turned: Sequence[UpdatedMemory],
    layer: int,
    seen: list[Bool[Tensor, " src"]],
    k: int,
) -> dict[str, Tensor]:
    demos = icl[0].tokens.demonstrations.slice
    # Where all queries see the same demonstration tokens (no sliding window between them), dW_ICL is one matrix.
    same = all(torch.equal(row[demos], seen[0][demos]) for row in seen)
    first = spectrum(_factors([delta_w_icl(run, layer) for run in (icl[:1] if same else icl)]))
    rest = [row[~run.in_demos] for run, row in zip(icl, seen, strict=True)]
    memory = [delta_w_ft(m, layer, row) for m, row in zip(memories, rest, strict=True)]
    second = spectrum(_factors(memory))
    null = spectrum(_factors([delta_w_ft(m, layer, row) for m, row in zip(turned, rest, strict=True)]))
    left, right = overlap(first, second, k=k)
    left_rotated, right_rotated = overlap(first, null, k=k)
    group = icl[0].model.n_heads // icl[0].model.n_kv_heads
    of_heads = {
        "frobenius": first.cosine(second),
        "left": left,
        "right": right,
        "left_rotated": left_rotated,
        "right_rotated": right_rotated,
        "rank_ft": second.effective_rank,
        "rank_icl": first.effective_rank.expand(len(icl), -1),
    }
    found = {name: _kept(t).repeat_interleave(group, dim=1) for name, t in of_heads.items()}
    found["linear_ft"] = _kept(torch.stack([_applied(m, run.q[-1, layer]) for m, run in zip(memory, icl, strict=True)]))
    pairs = zip(memories, rest, strict=True)
    changed = torch.stack([_changed(m, layer, row) for m, row in pairs]).cpu().repeat_interleave(group, dim=1)
    for name in found.keys() - {"rank_icl"}:  # else dW_FT is rounding
        found[name] = torch.where(changed[..., None] if found[name].ndim > 2 else changed, found[name], torch.nan)
    return found


def rotated(memories: Sequence[UpdatedMemory], *, seed: int) -> list[UpdatedMemory]:
    """The memories with what finetuning changed turned at random, one rotation for each layer and head.

    dW_FT also holds the model's own keys and values, which resemble those of the demonstrations whatever was learned: a
    random subspace would be too easy a null. A Gaussian update is as likely as any rotation of it.

    Args:
        memories: of queries behind the same demonstrations; all are turned alike, as one update changed them all.
        seed: of the rotations.
    """
    n_layers, _, n_heads, d_head = memories[0].k.shape
    generator = torch.Generator().manual_seed(seed)
    rotations = []
    for _ in ("k", "v"):
        q, r = torch.linalg.qr(torch.randn(n_layers, n_heads, d_head, d_head, generator=generator, dtype=torch.float64))
        rotations.append(q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :])  # uniform: the signs of R are fixed

    def turned(new: Tensor, old: Tensor, rotation: Tensor) -> Tensor:
        return old + torch.einsum("lshd,lhde->lshe", new - old, rotation.to(new))

    return [
        dataclasses.replace(
            memory,
            k_updated=turned(memory.k_updated, memory.k, rotations[0]),
            v_updated=turned(memory.v_updated, memory.v, rotations[1]),
        )
        for memory in memories
    ]


def _factors(matrices: Sequence[FactoredMatrix]) -> Factors:
    """Matrices of several queries together; sources of the shorter ones are filled with zeros, which add nothing."""
    longest = max(m.A.shape[-1] for m in matrices)
    pad = torch.nn.functional.pad
    return Factors(
        left=torch.stack([pad(m.A, (0, longest - m.A.shape[-1])) for m in matrices]),
        right=torch.stack([pad(m.B, (0, 0, 0, longest - m.B.shape[-2])) for m in matrices]),
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


def _kept(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor.detach()).cpu()
