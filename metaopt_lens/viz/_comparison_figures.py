"""Figures of a comparison: every value next to its null."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from metaopt_lens._plots import draws
from metaopt_lens.analysis import Comparison, Measured

_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_VALUE, _NULLS = "#1f5fa8", ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#7f8c8d", "#b08968")
_FEW_LAYERS = 12
_SHORT_NAME = 28  # characters that fit half the width of a figure
_ABOVE, _PLOT, _AXIS, _LEGEND_ROW = 64, 230, 44, 19  # heights of the parts of a curve's figure, in pixels
_DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")  # another number than colours: no pair comes twice


@draws(Comparison, "plot")
def comparison_map(comparison: Comparison, statistic: str = "z total") -> go.Figure:
    """A statistic of every head, its main null and the excess; at layer level curves over depth.

    Args:
        comparison: what `compare` returned.
        statistic: its name in `Comparison.statistics`.

    Raises:
        OptionError: the comparison has no such statistic.
    """
    found = comparison[statistic]
    figure = _head_maps(found) if found.level == "head" else _layer_curves(comparison, found)
    figure.update_layout(
        title={"text": _title(found), "font": {"size": 14}, "x": 0, "xref": "paper", "xanchor": "left"},
        font={"family": _FONT, "size": 12, "color": "#1f2933"},
        paper_bgcolor="white",
        plot_bgcolor="#eef1f4",
    )
    return figure


def depth_profile(comparison: Comparison, statistic: str = "z total") -> go.Figure:
    """Mean over the heads of each layer, with intervals and all nulls, against depth.

    Args:
        comparison: what `compare` returned.
        statistic: its name in `Comparison.statistics`.
    """
    figure = _layer_curves(comparison, comparison[statistic])
    figure.update_layout(title={"text": f"{statistic}, by depth", "font": {"size": 14}, "x": 0})
    return figure


def _title(statistic: Measured) -> str:
    return statistic.name if statistic.level != "head" else f"{statistic.name}; null: {statistic.main_null}"


def _head_maps(statistic: Measured) -> go.Figure:
    value = statistic.values.nanmean(0).numpy()
    null = statistic.nulls[statistic.main_null].nanmean(0).numpy()
    panels = {"value": value, "null": null, "excess": value - null}
    figure = make_subplots(rows=1, cols=3, subplot_titles=list(panels), horizontal_spacing=0.04, shared_yaxes=True)
    # One scale for all three: a null as large as the value must look as large.
    bound = max(float(np.nanmax(np.abs(np.stack([value, null])))), 1e-6)
    for column, (name, grid) in enumerate(panels.items(), start=1):
        figure.add_trace(
            go.Heatmap(
                z=[[None if np.isnan(x) else float(x) for x in row] for row in grid],
                zmin=-bound,
                zmax=bound,
                colorscale="RdBu",
                xgap=1,
                ygap=1,
                showscale=column == 3,
                colorbar={"thickness": 10, "outlinewidth": 0},
                hovertemplate=f"L%{{y}}H%{{x}}<br>{name} %{{z:.3f}}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(title={"text": "head", "standoff": 4}, showgrid=False, zeroline=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    figure.update_yaxes(title={"text": "layer", "standoff": 4}, col=1)
    figure.update_layout(
        height=min(max(130 + 26 * len(value), 220), 720), margin={"l": 44, "r": 56, "t": _ABOVE, "b": 40}
    )
    return figure


def _layer_curves(comparison: Comparison, statistic: Measured) -> go.Figure:
    per_layer = statistic.values.nanmean(2)
    found = comparison.statistic_interval(statistic, per_layer, level=0.95)
    depth = list(range(per_layer.shape[1]))
    centre = [None if x != x else x for x in found.estimate.tolist()]
    banded = (~found.low.isnan()).nonzero()[:, 0].tolist()
    low, high = (t[banded].tolist() for t in (found.low, found.high))
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=banded + banded[::-1],
            y=high + low[::-1],
            mode="lines",
            fill="toself",
            fillcolor="rgba(31,95,168,.15)",
            line={"width": 0},
            hoverinfo="skip",
            name="95 % interval",
        )
    )
    figure.add_trace(
        go.Scatter(x=depth, y=centre, mode="lines+markers", line={"color": _VALUE, "width": 3}, name="value")
    )
    for index, (name, null) in enumerate(statistic.nulls.items()):
        curve = [None if np.isnan(x) else float(x) for x in null.nanmean(2).nanmean(0).tolist()]
        line = {"width": 1.3, "color": _NULLS[index % len(_NULLS)], "dash": _DASHES[index % len(_DASHES)]}
        figure.add_trace(go.Scatter(x=depth, y=curve, mode="lines", line=line, name=f"{name} null"))
    figure.update_xaxes(title={"text": "layer", "standoff": 4}, range=[-0.5, len(depth) - 0.5], tickangle=0)
    figure.update_xaxes(**({"dtick": 1} if len(depth) <= _FEW_LAYERS else {"nticks": 8}))
    drawn = [y for trace in figure.data for y in trace.y if y is not None]
    if drawn and all(abs(y) <= 1 for trace in figure.data[1:] for y in trace.y if y is not None):
        # A similarity: the rest of an interval that is wider than all there can be is not drawn.
        figure.update_yaxes(range=[max(min(drawn) - 0.05, -1.05), min(max(drawn) + 0.05, 1.05)])
    # The legend stands below a plot of fixed height, in two columns where the names fit.
    columns = 2 if max(len(trace.name) for trace in figure.data) <= _SHORT_NAME else 1
    rows = -(-len(figure.data) // columns)
    below = _AXIS + _LEGEND_ROW * rows
    figure.update_layout(
        height=_ABOVE + _PLOT + below,
        margin={"l": 44, "r": 10, "t": _ABOVE, "b": below},
        legend={
            **{"orientation": "h", "yref": "paper", "y": -_AXIS / _PLOT, "yanchor": "top", "x": 0},
            **{"entrywidth": 0.96 / columns, "entrywidthmode": "fraction", "font": {"size": 10}},
        },
        font={"family": _FONT, "size": 12},
        plot_bgcolor="#eef1f4",
    )
    return figure
