"""What the report shows of the heads' measured effects."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from metaopt_lens.experiments import ExperimentResult
from metaopt_lens.viz._effects_map import heat_map
from metaopt_lens.viz._render import words

_HEADS_SHOWN, _NAMED = 40, 12
_HEAD_TITLES = {
    "rank": "rank",
    "name": "head",
    "exact": "effect",
    "low": "from",
    "high": "to",
    "first_order": "first-order estimate",
    "metric": "metric",
}
_SEED_TITLES = {
    "seed": "seed",
    "metric": "metric",
    "queries": "queries",
    "in_context": "in context",
    "zero_shot": "zero-shot",
    "gain": "gain",
    "heads_needed": "heads for 90 %",
    "heads_low": "from",
    "heads_high": "to",
    "heads": "which",
    "first_order_correlation": "correlation of estimate and effect",
    "note": "interval",
}


def attribution_context(run: ExperimentResult) -> dict[str, Any]:
    """Maps of the effects, how many heads carry the gain, and both tables in words.

    Args:
        run: a finished run that has the table ``attributions``.
    """
    table, seeds = run.table("attributions"), run.table("attribution_seeds")[list(_SEED_TITLES)]
    ranked = table.sort_values("rank", kind="stable")
    counts = {c: seeds[c].map(_count) for c in ("heads_needed", "heads_low", "heads_high")}
    said = {"metric": seeds["metric"].map(words), "heads": seeds["heads"].map(_first)}
    return {
        "first": ranked["name"].iloc[0],
        "maps": [(words(metric), _effect_map(group)) for metric, group in table.groupby("metric", sort=False)],
        "recovered": [_recovered(row) for row in run.table("attribution_recovery").to_dict("records")],
        "seeds": seeds.assign(**counts, **said).rename(columns=_SEED_TITLES),
        "ranked": ranked.head(_HEADS_SHOWN)[list(_HEAD_TITLES)]
        .assign(metric=ranked["metric"].map(words))
        .rename(columns=_HEAD_TITLES),
    }


def _effect_map(effects: pd.DataFrame) -> go.Figure:
    grid = effects.pivot(index="layer", columns="head", values="exact")
    plot = go.Figure(heat_map(grid.to_numpy().tolist(), max(float(grid.abs().to_numpy().max()), 1e-9)))
    plot.update_layout(height=min(max(130 + 26 * len(grid), 220), 720), margin={"l": 44, "r": 10, "t": 20, "b": 40})
    plot.update_xaxes(title="head", dtick=1)
    plot.update_yaxes(title="layer", autorange="reversed", dtick=1)
    return plot


def _count(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.0f}"


def _first(names: str) -> str:
    """The first of many heads, and how many more there are."""
    heads = names.split()
    rest = len(heads) - _NAMED
    return names if rest <= 0 else f"{' '.join(heads[:_NAMED])} and {rest} more"


def _recovered(row: dict[Any, Any]) -> str:
    """The recovery over all sets in one sentence."""
    start = f"{words(row['metric']).capitalize()}: "
    if pd.isna(row["heads_needed"]):
        return start + str(row["note"])
    interval = "" if pd.isna(row["heads_low"]) else f" ({row['heads_low']:.0f} to {row['heads_high']:.0f})"
    return (
        f"{start}{row['heads_needed']:.0f}{interval} heads recover 90 % of the in-context gain on held-out queries "
        f"({row['note']})."
    )
