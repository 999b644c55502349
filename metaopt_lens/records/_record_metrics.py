"""The published metrics of some recorded queries, by the statistics of `metaopt_lens.analysis`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis import (
    Convention,
    QueryStatistic,
    context_columns,
    cosine,
    finetuning_scores,
    kendall_tau,
    other_query_null,
    random_null,
    sim_am,
    sim_aou,
    topk_recall,
    training_attention,
    unit,
)
from metaopt_lens.records._recorded import RecordedDemos, RecordedQueries

Found = dict[str, QueryStatistic | str]  # a string says why the metric is undefined
LEVELS = ("example", "token")
# First map, second map, what is subtracted from both.
_MAPS = {"SimAM": ("icl", "ftzs", None), "ZSL SimAM": ("icl", "zs", None), "ICL-FTZS SimAM": ("icl", "ftzs", "zs")}


@dataclass(frozen=True)
class Measures:
    """What all queries are measured with; see `analyze_records`."""

    convention: Convention
    top_k: Mapping[str, int]
    null_draws: int
    generator: torch.Generator


def update_metrics(queries: RecordedQueries, measures: Measures) -> Found:
    """SimAOU in both forms with its nulls, and SimAM in all three."""
    convention = measures.convention
    zs, icl, ft = (queries.attn_out[kind] for kind in ("zs", "icl", "ftzs"))
    aou = sim_aou(icl, zs, ft, convention=convention)
    zs, icl, ft = zs.double(), icl.double(), ft.double()
    # A zero vector has no direction.
    units = [unit(hidden, convention=convention).nan_to_num() for hidden in (icl, zs, ft)]
    normalised, plain = (units[0] - units[1], units[2] - units[1]), (icl - zs, ft - zs)
    draws: dict[str, Any] = {
        "n_draws": measures.null_draws,
        "seed": measures.generator,
        "similarity": partial(cosine, convention=convention),
    }
    random = random_null(*normalised, convention=convention, **draws).values.nanmean(0)
    found: Found = {
        "SimAOU": aou.normalised,
        "SimAOU unnormalised": aou.plain,
        "SimAOU null": aou.null,
        "SimAOU random": QueryStatistic(random, aou.normalised.undefined_because),
    }
    for name, pair in (("SimAOU other query", normalised), ("SimAOU unnormalised other query", plain)):
        if len(icl) < 2:
            found[name] = "there is no other query"
            continue
        values = other_query_null(*pair, **draws).values.nanmean(0)
        values = torch.where(aou.plain.defined, values, torch.nan)
        found[name] = QueryStatistic(values, aou.plain.undefined_because)
    for name, (first, second, base) in _MAPS.items():
        found[name] = sim_am(
            queries.attn_map[first],
            queries.attn_map[second],
            baseline=None if base is None else queries.attn_map[base],
            lengths=queries.lengths,
            convention=convention,
        ).per_query
    return found


def training_metrics(
    context: Float[Tensor, "query layer src"],
    attn_q: Float[Tensor, "query layer d_model"],
    demos: RecordedDemos,
    measures: Measures,
) -> Found:
    """Kendall's tau and top-k recall of the attention to the demonstrations, per example and per token."""
    scores = context[:, :, context_columns(demos.lengths)], finetuning_scores(demos.attn_q, attn_q)
    maps = training_attention(*scores, demos.lengths, convention=measures.convention)
    pairs = {"example": (maps.icl_example, maps.ft_example), "token": (maps.icl_token, maps.ft_token)}
    found: Found = {}
    for level, pair in pairs.items():
        found[f"{level}-level kendall"] = kendall_tau(*pair)
        k, available = measures.top_k[level], pair[0].shape[-1]
        found[f"{level}-level recall_topk"] = (
            f"top-{k} needs {k} entries, the recording has {available}"
            if k > available
            else topk_recall(*pair, k=k, convention=measures.convention).per_query
        )
    return found


def chance(
    found: Mapping[str, Sequence[float | None]], demos: RecordedDemos, measures: Measures
) -> dict[str, tuple[float, ...]]:
    """What each metric is by chance at each layer, where that is known; `found` has the drawn nulls' layers."""
    nulls: dict[str, Sequence[float | None]] = {
        "SimAOU": found["SimAOU null"],
        "SimAOU unnormalised": found["SimAOU unnormalised other query"],
    }
    n_layers = demos.attn_q.shape[1]
    for level, available in zip(LEVELS, (len(demos.lengths), int(demos.lengths.sum())), strict=True):
        nulls[f"{level}-level kendall"] = [0.0] * n_layers
        nulls[f"{level}-level recall_topk"] = [measures.top_k[level] / available] * n_layers
    known = {name: tuple(value for value in layers if value is not None) for name, layers in nulls.items()}
    return {name: layers for name, layers in known.items() if len(layers) == n_layers}
