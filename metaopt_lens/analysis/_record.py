"""Record what a comparison needs from the runs of one demonstration set, on the CPU, a query a row."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis._matrices import Factors, effective_rank, frobenius_cosine, principal_angles
from metaopt_lens.analysis._similarity import difference
from metaopt_lens.decomposition import run_settings, without_demos
from metaopt_lens.dual import (
    ScoreRule,
    attention_scores,
    linear_weights,
    split_softmax,
    visible_sources,
    weighted_values,
)
from metaopt_lens.extraction import (
    QueryCapture,
    capture_queries,
    choose_batch_size,
    map_batches,
    run_shared_prefix,
)
from metaopt_lens.finetuning import UpdatedMemory, WeightUpdate, updated_memory
from metaopt_lens.models import AttentionModel, Prefix
from metaopt_lens.prompts import TokenizedPrompt


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
    model: AttentionModel,
    tokenized: Sequence[TokenizedPrompt],
    update: WeightUpdate,
    *,
    subspace_dim: int,
    batch_size: int | None = None,
) -> SetRecord:
    """Run every setting over queries that share their demonstrations; the demonstrations are run once per model."""
    base = run_shared_prefix(model, tokenized[0].ids[: tokenized[0].query.start])
    with update.applied(model):
        tuned = run_shared_prefix(model, tokenized[0].ids[: tokenized[0].query.start])
    assert base is not None
    assert tuned is not None
    longest = max(len(t.query) for t in tokenized)

    def run(batch: list[TokenizedPrompt]) -> list[dict[str, Tensor]]:
        return _record_batch(model, batch, update, base, tuned, subspace_dim=subspace_dim)

    size = batch_size or max(1, choose_batch_size(model, n_new=longest, n_prefix=base.n_tokens) // 2)
    rows = map_batches(list(tokenized), lambda t: len(t.query), run, batch_size=size)
    return _stack(rows, longest)


def _stack(rows: list[dict[str, Tensor]], longest: int) -> SetRecord:
    stacked = {}
    for field in fields(SetRecord):
        tensors = [row[field.name] for row in rows]
        if field.name.startswith("scores_"):
            tensors = [torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=torch.nan) for t in tensors]
        stacked[field.name] = torch.stack(tensors)
    return SetRecord(**stacked)


def _record_batch(
    model: AttentionModel,
    batch: list[TokenizedPrompt],
    update: WeightUpdate,
    base: Prefix,
    tuned: Prefix,
    *,
    subspace_dim: int,
) -> list[dict[str, Tensor]]:
    demos = batch[0].demonstrations
    queries = [t.ids[t.query.start :] for t in batch]
    last = [[len(q) - 1] for q in queries]
    runs = run_settings(model, base, batch, [[t.n_tokens - 1] for t in batch], zero_shot_runs="both")
    assert runs.zero_shot is not None
    assert runs.position_matched is not None
    raw_queries: list[Tensor] = []

    def keep_query(q: Tensor) -> None:
        rows = [q[row, len(ids) - 1] for row, ids in enumerate(queries)]
        raw_queries.append(torch.stack(rows))

    with update.applied(model):
        query_hooks = [(model.hook_name("q", layer), keep_query) for layer in range(model.info.n_layers)]
        with model.hooked(query_hooks):
            ft = capture_queries(model, tuned.truncate(demos.start), queries, last)
        matched_ft = capture_queries(model, tuned, queries, last, edit=lambda call: without_demos(call, demos))
    memory = updated_memory(model, update, base, demos, batch[0].ids[: demos.start], queries)
    return [
        _record_query(
            model,
            prompt,
            update,
            base,
            runs.in_context[i],
            {"zs": runs.zero_shot[i], "zsm": runs.position_matched[i], "ft": ft[i], "ftm": matched_ft[i]},
            memory[i],
            torch.stack([q[i] for q in raw_queries]),
            subspace_dim,
        )
        for i, prompt in enumerate(batch)
    ]


def _record_query(
    model: AttentionModel,
    prompt: TokenizedPrompt,
    update: WeightUpdate,
    base: Prefix,
    icl: QueryCapture,
    others: dict[str, QueryCapture],
    memory: UpdatedMemory,
    raw_query: Tensor,
    subspace_dim: int,
) -> dict[str, Tensor]:
    layers = []
    for layer in range(model.info.n_layers):
        # The metrics speak of scores before masking, so a sliding window does not enter.
        rule = replace(model.score_rule(layer), window=None)
        k, v = torch.cat([base.k[layer], icl.k[layer]]), torch.cat([base.v[layer], icl.v[layer]])
        row = _exact_part(icl, v, layer, prompt)
        for name, capture in {"icl": icl, **others}.items():
            row[f"z_{name}"] = capture.z[0, layer]
            if name in {"icl", "zs", "ft"}:
                row[f"hidden_{name}"] = _attention_output(model, layer, capture, update if name == "ft" else None)
                row[f"scores_{name}"] = _own_scores(rule, capture, layer, prompt, in_context=name == "icl")
        row |= _linear_part(model, icl.q[:, layer], k, v, memory, layer, prompt, subspace_dim)
        row["context_scores"] = _context_scores(rule, icl.q[:, layer], k, prompt)
        row["queries_ft"] = (raw_query[layer] * rule.scale).flatten()
        layers.append(
            {
                name: t.detach().to(torch.float64 if t.dtype == torch.float64 else torch.float32).cpu()
                for name, t in row.items()
            }
        )
    record = {name: torch.stack([row[name] for row in layers]) for name in layers[0]}
    record["lengths"] = torch.tensor(len(prompt.query))
    record["eps"] = torch.tensor(max(torch.finfo(dtype).eps for dtype in (icl.z.dtype, torch.float32)))
    return record


def _exact_part(icl: QueryCapture, v: Tensor, layer: int, prompt: TokenizedPrompt) -> dict[str, Tensor]:
    parts = split_softmax(icl.pattern[0, layer][:, None], v, prompt.demonstrations, sink=icl.sink[0, layer][:, None])
    return {"mass": parts.mass[0], "direct": parts.update[0], "meta_gradient": parts.meta_gradient[0]}


def _attention_output(
    model: AttentionModel, layer: int, capture: QueryCapture, update: WeightUpdate | None
) -> Float[Tensor, " d_model"]:
    """After W_O and b_O, with an update of the output projection where there is one."""
    z = capture.z[0, layer]
    weight, bias = model.w_o(layer).to(z), model.b_o(layer)
    bias = torch.zeros(model.info.d_model, dtype=z.dtype, device=z.device) if bias is None else bias.to(z)
    if update is not None and update.w_o is not None:
        weight = weight + update.w_o[layer].to(z)
    if update is not None and update.b_o is not None:
        bias = bias + update.b_o[layer].to(z)
    return torch.einsum("hd,hdm->m", z, weight) + bias


def _own_scores(
    rule: ScoreRule, capture: QueryCapture, layer: int, prompt: TokenizedPrompt, *, in_context: bool
) -> Float[Tensor, "head pos"]:
    """Scores from the last token to the query's own tokens, before the softmax."""
    start = prompt.query.start if in_context else prompt.demonstrations.start
    at = torch.arange(start, start + len(prompt.query), device=capture.z.device)
    return attention_scores(rule, capture.q[:, layer], capture.k[layer], dst_positions=at[-1:], src_positions=at)[:, 0]


def _context_scores(rule: ScoreRule, q: Tensor, k: Tensor, prompt: TokenizedPrompt) -> Float[Tensor, " src"]:
    """Scores from the last token to the demonstrations' tokens (no separators), summed over the heads."""
    columns = [
        i for demo, label in zip(prompt.demos, prompt.labels, strict=True) for i in range(demo.start, label.stop)
    ]
    at = torch.tensor(columns, device=k.device)
    last = torch.tensor([prompt.n_tokens - 1], device=k.device)
    return attention_scores(rule, q, k[at], dst_positions=last, src_positions=at)[:, 0].sum(0)


def _linear_part(
    model: AttentionModel,
    q: Float[Tensor, "1 head d_head"],
    k: Float[Tensor, "src kv_head d_head"],
    v: Float[Tensor, "src kv_head d_head"],
    memory: UpdatedMemory,
    layer: int,
    prompt: TokenizedPrompt,
    subspace_dim: int,
) -> dict[str, Tensor]:
    """The linear form of one layer: both updates applied to the in-context query, and the matrices compared."""
    positions = torch.arange(prompt.n_tokens, device=k.device)
    seen = visible_sources(model.score_rule(layer), positions[-1:], positions)[0]
    demos = prompt.demonstrations
    in_demos = (positions >= demos.start) & (positions < demos.stop)
    d, z = seen & in_demos, seen[~in_demos]

    def applied(keys: Tensor, values: Tensor) -> Tensor:
        everything = torch.ones(1, len(keys), dtype=torch.bool, device=keys.device)
        return weighted_values(linear_weights(q, keys, everything), values)[0]

    # (v + dv)(k + dk) - v k = dv (k + dk) + v dk: nothing large cancels.
    k_old, k_new, v_old, v_new = (t[layer][z] for t in (memory.k, memory.k_updated, memory.v, memory.v_updated))
    dk, dv = k_new - k_old, v_new - v_old

    def finetuned(dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values whose outer products add up to dW_FT."""
        return torch.cat([k_old + dk, dk]), torch.cat([dv, v_old])

    ft_keys, ft_values = finetuned(dk, dv)
    icl = Factors(_heads_first(v[d]).mT, _heads_first(k[d]))
    ft = Factors(_heads_first(ft_values).mT, _heads_first(ft_keys))
    angles_left, angles_right = _mean_squared_cosines(icl, ft, subspace_dim)
    # dW_FT also holds the model's own keys and values, which resemble those of the demonstrations whatever was learned:
    # a random subspace would be too easy a null. A Gaussian update is as likely as any rotation of it.
    generator = torch.Generator().manual_seed(zlib.crc32(str((layer, prompt.ids)).encode()))
    turned = (torch.einsum("shd,hde->she", t, _rotations(t, generator)) for t in (dk, dv))
    keys, values = finetuned(*turned)
    rotated = Factors(_heads_first(values).mT, _heads_first(keys))
    rotated_left, rotated_right = _mean_squared_cosines(icl, rotated, subspace_dim)
    matrices = {
        "frobenius": frobenius_cosine(icl, ft),
        "subspace_left": angles_left,
        "subspace_right": angles_right,
        "subspace_left_rotated": rotated_left,
        "subspace_right_rotated": rotated_right,
        "rank_icl": effective_rank(icl),
        "rank_ft": effective_rank(ft),
    }
    group = model.info.n_heads // model.info.n_kv_heads
    changed = _above_rounding(v_new, v_old) | _above_rounding(k_new, k_old)  # else dW_FT is rounding
    for name in matrices.keys() - {"rank_icl"}:
        matrices[name] = torch.where(changed, matrices[name], torch.nan)
    per_head = {name: t.to(k.device).repeat_interleave(group) for name, t in matrices.items()}
    linear_ft = applied(ft_keys, ft_values)
    linear_ft = torch.where(changed.repeat_interleave(group)[:, None], linear_ft, torch.nan)
    return {"linear_icl": applied(k[d], v[d]), "linear_ft": linear_ft, **per_head}


def _rotations(
    like: Float[Tensor, "src kv_head d_head"], generator: torch.Generator
) -> Float[Tensor, "kv_head d_head d_head"]:
    """A uniformly random orthogonal matrix for each head."""
    _, n_heads, d_head = like.shape
    q, r = torch.linalg.qr(torch.randn(n_heads, d_head, d_head, generator=generator, dtype=torch.float64))
    turned: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    return turned.to(like)


def _above_rounding(
    new: Float[Tensor, "src kv_head d_head"], old: Float[Tensor, "src kv_head d_head"]
) -> Bool[Tensor, " kv_head"]:
    """Whether an update changed a head's keys (values) by more than rounding."""
    flat = [_heads_first(t).flatten(1) for t in (new, old)]  # [kv_head, src * d_head]
    return ~difference(*flat).isnan().any(-1)


def _heads_first(tensor: Float[Tensor, "src kv_head d_head"]) -> Float[Tensor, "kv_head src d_head"]:
    return tensor.transpose(0, 1)


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
