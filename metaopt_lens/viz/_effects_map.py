"""Pictures of what every head's meta-gradient does to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens._plots import draws
from metaopt_lens.interventions import HeadEffects


@draws(HeadEffects, "plot")
def effects_map(effects: HeadEffects) -> go.Figure:
    """Layer x head maps of exact effects and first-order estimates, and the gain recovered on held-out queries.

    Args:
        effects: what `head_effects` returned.
    """
    titles = (
        "exact knock-out" if effects.is_exact else "not knocked out",
        "first-order estimate",
        "gain recovered by heads in rank order (held out)",
    )
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.07)
    estimate = effects.first_order.mean(0)
    exact = effects.exact.mean(0)
    bound = max(float(torch.stack([exact, estimate]).nan_to_num().abs().max()), 1e-9)
    for column, grid in ((1, exact), (2, estimate)):
        figure.add_trace(heat_map(_cells(grid), bound, showscale=False), row=1, col=column)
    try:
        found = effects.recovery()
    except UndefinedMetricError:
        figure.add_annotation(text="undefined", showarrow=False, x=0.5, y=0.5, row=1, col=3)
    else:
        recovered = found.curve.tolist()
        curve = go.Scatter(x=list(range(len(recovered))), y=recovered, mode="lines+markers", showlegend=False)
        figure.add_trace(curve, row=1, col=3)
        figure.add_hline(y=0.9, line={"dash": "dot", "color": "#7f8c8d"}, row=1, col=3)
    for column in (1, 2):
        figure.update_xaxes(title="head", dtick=max(1, effects.model.n_heads // 12), row=1, col=column)
        figure.update_yaxes(autorange="reversed", dtick=max(1, effects.model.n_layers // 12), row=1, col=column)
    figure.update_yaxes(title="layer", row=1, col=1)
    figure.update_xaxes(title="heads", row=1, col=3)
    figure.update_layout(
        title=f"Effect of the meta-gradient on the {effects.metric.replace('_', ' ')}",
        height=min(max(160 + 26 * effects.model.n_layers, 300), 720),
    )
    return figure


def _cells(grid: Tensor) -> list[list[float | None]]:
    """The map's numbers; None, an empty cell, for heads that were not measured."""
    return [[None if value != value else value for value in row] for row in grid.tolist()]


def heat_map(grid: Sequence[Sequence[float | None]], bound: float, *, showscale: bool = True) -> Any:
    """A signed layer x head map on a scale that is symmetric about 0."""
    return go.Heatmap(
        z=grid,
        zmin=-bound,
        zmax=bound,
        colorscale="RdBu",
        xgap=1,
        ygap=1,
        showscale=showscale,
        colorbar={"thickness": 10, "outlinewidth": 0},
        hovertemplate="L%{y}H%{x}<br>%{z:.4g}<extra></extra>",
    )
