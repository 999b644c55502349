"""The published metrics of some recorded queries: rows of `STATISTICS`, read from files in place of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis import (
    ANALYTIC,
    OTHER_QUERY,
    Context,
    QueryStatistic,
    am_maps,
    aou_updates,
    context_columns,
    cosine,
    finetuning_scores,
    random_null,
    statistic,
    training_attention,
)
from metaopt_lens.records._recorded import RecordedDemos, RecordedQueries

Found = dict[str, QueryStatistic | str]  # a string says why the metric is undefined
LEVELS = ("example", "token")
# The published name, and the statistic (or a null of one) that it is.
_OF_OUTPUTS = {
    "SimAOU": ("SimAOU", None),
    "SimAOU unnormalised": ("SimAOU unnormalised", None),
    "SimAOU null": ("SimAOU", ANALYTIC),
    "SimAOU other query": ("SimAOU", OTHER_QUERY),
    "SimAOU unnormalised other query": ("SimAOU unnormalised", OTHER_QUERY),
}
# Of attention maps also the second map (the first is that in context), and what is subtracted from both.
_OF_MAPS = {
    "SimAM": ("SimAM ICL-FT", "ftzs", None),
    "ZSL SimAM": ("SimAM ICL-ZS", "zs", None),
    "ICL-FTZS SimAM": ("SimAM difference", "ftzs", "zs"),
}
_OF_TRAINING = {"kendall": "Kendall, {level} level", "recall_topk": "top-{{{level}}} recall, {level} level"}


def update_metrics(queries: RecordedQueries, context: Context) -> Found:
    """SimAOU in both forms with its nulls, and SimAM in all three.

    Args:
        queries: some of a recording.
        context: what they are measured with.
    """
    icl, zs, ft = (queries.attn_out[kind][:, :, None] for kind in ("icl", "zs", "ftzs"))  # [query layer 1 d_model]
    found: Found = {}
    for name, (row, null) in _OF_OUTPUTS.items():
        alone = null == OTHER_QUERY and len(icl) < 2
        found[name] = "there is no other query" if alone else _measured((icl, zs, ft), row, null, context)
    found["SimAOU random"] = _random(icl, zs, ft, context)
    for name, (row, second, baseline) in _OF_MAPS.items():
        maps = am_maps(
            queries.attn_map["icl"],
            queries.attn_map[second],
            baseline=None if baseline is None else queries.attn_map[baseline],
            lengths=queries.lengths,
            convention=context.convention,
        )
        found[name] = _measured((*maps, queries.lengths), row, None, context)
    return found


def training_metrics(
    scores: Float[Tensor, "query layer src"],
    attn_q: Float[Tensor, "query layer d_model"],
    demos: RecordedDemos,
    context: Context,
) -> Found:
    """Kendall's tau and top-k recall of the attention to the demonstrations, per example and per token.

    Args:
        scores: to the whole context, summed over heads.
        attn_q: query vectors of the finetuned run.
        demos: of the recording.
        context: what they are measured with.
    """
    both = scores[:, :, context_columns(demos.lengths)], finetuning_scores(demos.attn_q, attn_q)
    maps = training_attention(*both, demos.lengths, convention=context.convention)
    found: Found = {}
    for level, pair in (("example", (maps.icl_example, maps.ft_example)), ("token", (maps.icl_token, maps.ft_token))):
        k, available = context.top_k[level], pair[0].shape[-1]
        for metric, row in _OF_TRAINING.items():
            name = f"{level}-level {metric}"
            if metric == "recall_topk" and k > available:
                found[name] = f"top-{k} needs {k} entries, the recording has {available}"
            else:
                found[name] = _measured(pair, row.format(level=level), None, context)
    return found


def _measured(readings: tuple[Tensor, ...], name: str, null: str | None, context: Context) -> QueryStatistic:
    """A row of the table, or a null of one, per query and layer."""
    row = statistic(name)
    values = row.value(readings, context) if null is None else row.nulls[null](readings, context)
    assert values is not None
    return QueryStatistic(values[..., 0].double(), row.undefined)


def _random(icl: Tensor, zs: Tensor, ft: Tensor, context: Context) -> QueryStatistic:
    """The published baseline of SimAOU: random vectors in place of the finetuning update of normalised outputs."""
    pair = aou_updates(icl, zs, ft, normalised=True, convention=context.convention)
    like = [update.nan_to_num() for update in pair]  # what has no direction is replaced all the same
    draws = random_null(
        *like,
        n_draws=context.n_draws,
        seed=context.generator,
        similarity=partial(cosine, convention=context.convention),
        convention=context.convention,
    )
    return QueryStatistic(draws.values.nanmean(0)[..., 0], statistic("SimAOU").undefined)


def chance(
    found: Mapping[str, Sequence[float | None]], demos: RecordedDemos, context: Context
) -> dict[str, tuple[float, ...]]:
    """What each metric is by chance at each layer, where that is known.

    Args:
        found: the layers of every metric, drawn nulls among them.
        demos: of the recording.
        context: what they were measured with.
    """
    nulls: dict[str, Sequence[float | None]] = {
        "SimAOU": found["SimAOU null"],
        "SimAOU unnormalised": found["SimAOU unnormalised other query"],
    }
    n_layers = demos.attn_q.shape[1]
    for level, available in zip(LEVELS, (len(demos.lengths), int(demos.lengths.sum())), strict=True):
        nulls[f"{level}-level kendall"] = [0.0] * n_layers
        nulls[f"{level}-level recall_topk"] = [context.top_k[level] / available] * n_layers
    known = {name: tuple(value for value in layers if value is not None) for name, layers in nulls.items()}
    return {name: layers for name, layers in known.items() if len(layers) == n_layers}
