"""plotly: whether learners follow the label words that demonstrations show."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from metaopt_lens._plots import draws
from metaopt_lens.analysis import LabelFollowing

_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 12, "color": "#1f2933"}
_COLOURS = ("#1f5fa8", "#d1495b", "#edae49", "#66a182")


@draws(LabelFollowing, "plot")
def following_figure(found: LabelFollowing) -> go.Figure:
    """Accuracy over learning rates, a panel for each kind of label words; solid: as shown, dotted: natural labels.

    Args:
        found: of `follow_labels`.
    """
    table = found.to_frame()
    kinds, learners = list(dict.fromkeys(table["labels"])), list(dict.fromkeys(table["learner"]))
    titles = [f"{kind} labels" for kind in kinds]
    figure = make_subplots(rows=1, cols=len(kinds), shared_yaxes=True, subplot_titles=titles)
    rates = sorted(set(table["lr"]) - {0.0})
    for (kind, learner, against), rows in table.groupby(["labels", "learner", "against"], sort=False):
        column = kinds.index(kind) + 1
        curve = _curve(rows, rates).update(
            name=f"{learner}, {against}",
            legendgroup=f"{learner}, {against}",
            showlegend=column == 1,
            line={"color": _COLOURS[learners.index(learner)], "dash": "solid" if against == "shown" else "dot"},
        )
        figure.add_trace(curve, row=1, col=column)
    figure.update_xaxes(type="log", title={"text": "learning rate", "standoff": 4})
    figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_yaxes(title="accuracy", col=1)
    figure.update_layout(
        font=_FONT,
        plot_bgcolor="#eef1f4",
        paper_bgcolor="white",
        height=380,
        margin={"l": 50, "r": 10, "t": 50, "b": 90},
        legend={"orientation": "h", "y": -0.25, "font": {"size": 10}},
    )
    return figure


def _curve(rows: Any, rates: list[float]) -> go.Scatter:
    """A learner over its rates; in context there is none, so its line goes across."""
    if set(rows["lr"]) == {0.0}:
        return go.Scatter(x=rates, y=list(rows["accuracy"]) * len(rates), mode="lines")
    error = {
        "type": "data",
        "symmetric": False,
        "array": (rows["high"] - rows["accuracy"]).fillna(0).tolist(),
        "arrayminus": (rows["accuracy"] - rows["low"]).fillna(0).tolist(),
        "thickness": 1,
    }
    return go.Scatter(x=rows["lr"].tolist(), y=rows["accuracy"].tolist(), mode="lines+markers", error_y=error)
