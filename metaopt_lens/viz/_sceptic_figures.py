"""plotly: how much of the in-context update is explained, by what."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from metaopt_lens._plots import draws
from metaopt_lens.analysis import Ceiling, DemonstrationAlgebra, OptimiserLadder, OrderSpread
from metaopt_lens.analysis._ladder import gated

_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 12, "color": "#1f2933"}

_GATED = gated("")
_LEFT, _RIGHT = -0.25, 1.05  # ends of the scale of shares; a scale as long as the worst R² would hide the others


@draws(Ceiling, "plot")
def ceiling_figure(found: Ceiling) -> go.Figure:
    """One line for each changed matrix, a point with its interval for each update.

    Args:
        found: of `ceiling`.
    """
    table = found.to_frame()
    figure = go.Figure()
    for target in found.targets:
        rows = table[table["target"] == target]
        figure.add_trace(_points(target, rows["update"], rows["r_squared"], rows["low"], rows["high"]))
    return _laid_out(figure, "held-out R² of the in-context update", found.r_squared(target=target).label)


@draws(OptimiserLadder, "plot")
def ladder_figure(found: OptimiserLadder) -> go.Figure:
    """A point with its interval for each rung, with and without the softmax gate.

    Args:
        found: of `optimiser_ladder`.
    """
    table = found.to_frame()
    is_gated = table["rung"].str.endswith(_GATED)
    figure = go.Figure()
    for name, rows in (("plain", table[~is_gated]), ("with the softmax gate", table[is_gated])):
        rungs = rows["rung"].str.removesuffix(_GATED)
        figure.add_trace(_points(name, rungs, rows["r_squared"], rows["low"], rows["high"]))
    return _laid_out(figure, "held-out R² of the in-context update", found.r_squared(found.rungs[0]).label)


@draws(OrderSpread, "plot")
def order_figure(found: OrderSpread) -> go.Figure:
    """Spread of updates and distance of predictions, a point with its interval for each learner.

    Args:
        found: of `order_spread`.
    """
    table = found.to_frame()
    figure = go.Figure()
    for name, key in (("variance of updates / mean square", "spread"), ("distance of predictions", "distance")):
        columns = (table[key], table[f"{key}_low"], table[f"{key}_high"])
        figure.add_trace(_points(name, table["learner"], *columns))
    return _laid_out(figure, f"what {found.n_orders} orders of the demonstrations change", found.spread().label)


@draws(DemonstrationAlgebra, "plot")
def algebra_figure(found: DemonstrationAlgebra) -> go.Figure:
    """Shares of what company changes, and R² of the sums, a point with its interval for each.

    Args:
        found: of `demonstration_algebra`.
    """
    table = found.to_frame()
    figure = go.Figure()
    for name, lead in (("what company changes", "company: "), ("R² of the update of all", "R^2: ")):
        rows = table[table["quantity"].str.startswith(lead)]
        labels = rows["quantity"].str.removeprefix(lead)
        figure.add_trace(_points(name, labels, rows["estimate"], rows["low"], rows["high"]))
    return _laid_out(figure, "demonstrations alone, in company and in sum", found.share("size").label)


def _points(name: str, labels: Any, values: Any, low: Any, high: Any) -> go.Scatter:
    """Points with intervals; what lies off the scale is an arrow at its end, with the value."""

    def reach(end: float, v: float) -> float:
        return 0.0 if math.isnan(end) or not _LEFT <= v <= _RIGHT else abs(end - v)

    up = [reach(h, v) for h, v in zip(high, values, strict=True)]
    down = [reach(w, v) for w, v in zip(low, values, strict=True)]
    return go.Scatter(
        x=[None if math.isnan(v) else min(max(v, _LEFT), _RIGHT) for v in values],
        y=list(labels),
        customdata=list(values),
        name=name,
        mode="markers+text",
        marker={
            "size": 9,
            "symbol": ["triangle-left" if v < _LEFT else "triangle-right" if v > _RIGHT else "circle" for v in values],
        },
        text=[f"{v:.2f}".replace("-", "−") if v < _LEFT or v > _RIGHT else "" for v in values],
        error_x={"type": "data", "symmetric": False, "array": up, "arrayminus": down},
        hovertemplate="%{y}: %{customdata:.3f}<extra>" + name + "</extra>",
    )


def _laid_out(figure: go.Figure, what: str, scope: str) -> go.Figure:
    figure.update_layout(
        title={"text": f"{what}, 95 % intervals {scope}", "x": 0, "font": {"size": 14}},
        font=_FONT,
        plot_bgcolor="white",
        paper_bgcolor="white",
    )
    for height, trace in zip(("top", "bottom"), figure.data, strict=False):
        trace.textposition = [f"{height} {'left' if x == _RIGHT else 'right'}" for x in trace.x]
    figure.update_xaxes(
        title=what, range=[_LEFT - 0.03, _RIGHT + 0.03], zeroline=True, zerolinecolor="#52606d", gridcolor="#e4e7eb"
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure
