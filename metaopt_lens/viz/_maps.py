"""plotly: layer x head maps."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from metaopt_lens._plots import draws
from metaopt_lens.decomposition import Decomposition, DecompositionSet
from metaopt_lens.viz._table import head_grid, measure, n_averaged

_CELL, _FRAME = 30, 110
_HEIGHTS = (200, 720)
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@draws(Decomposition, "plot")
def head_map(result: Decomposition | DecompositionSet, value: str = "mass") -> go.Figure:
    """A layer x head map of a numeric column of `to_frame()`, or of `meta_gradient_share`.

    Several positions or prompts are averaged, and the title says so.

    Args:
        result: what `decompose` returned.
        value: a numeric column, such as ``"fidelity"``.

    Raises:
        OptionError: the table has no such column.
    """
    grid = head_grid(result, value)
    about = measure(value)
    n = n_averaged(result)
    title = about.title if n == 1 else f"{about.title} (mean of {n})"
    heatmap: dict[str, Any] = {
        "z": [[float(v) for v in row] for row in grid.to_numpy()],
        "x": [int(head) for head in grid.columns],
        "y": [int(layer) for layer in grid.index],
        "hovertemplate": f"L%{{y}}H%{{x}}<br>{about.title} %{{z:.4g}}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}},
        **_colours(value, grid),
    }
    figure = go.Figure(go.Heatmap(**heatmap))
    figure.update_layout(
        title={"text": title, "font": {"size": 14}, "x": 0, "xref": "paper", "xanchor": "left"},
        font={"family": _FONT, "size": 12, "color": "#1f2933"},
        height=min(max(_FRAME + _CELL * len(grid), _HEIGHTS[0]), _HEIGHTS[1]),
        margin={"l": 44, "r": 10, "t": 42, "b": 40},
        paper_bgcolor="white",
        plot_bgcolor="#eef1f4",
    )
    figure.update_xaxes(
        title={"text": "head", "standoff": 4}, showgrid=False, zeroline=False, **_ticks(len(grid.columns))
    )
    figure.update_yaxes(
        title={"text": "layer", "standoff": 4},
        showgrid=False,
        zeroline=False,
        autorange="reversed",
        **_ticks(len(grid)),
    )
    return figure


def _colours(value: str, grid: pd.DataFrame) -> dict[str, Any]:
    if value == "fidelity":
        return {"colorscale": "RdBu", "zmin": -1, "zmax": 1}
    if value == "mass":
        return {"colorscale": "Blues", "zmin": 0, "zmax": 1}
    return {"colorscale": "Blues", "zmin": 0, "zmax": max(float(grid.to_numpy().max()), 1e-9)}


def _ticks(n: int) -> dict[str, Any]:
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, n) if n / s <= 16)
    return {"tickmode": "linear", "tick0": 0, "dtick": step}
