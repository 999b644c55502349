"""plotly: rank correlations of head scores as a matrix, two scores as a scatter plot."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from metaopt_lens._errors import OptionError
from metaopt_lens._plots import draws
from metaopt_lens.analysis import HeadProfile

_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 12, "color": "#1f2933"}


@draws(HeadProfile, "plot")
def profile_figure(profile: HeadProfile, first: str | None = None, second: str | None = None) -> go.Figure:
    """A matrix of Spearman's rho between all scores, or a scatter plot of two, a point per head.

    Args:
        profile: of the heads.
        first: score along x; None for the matrix.
        second: score along y.

    Raises:
        OptionError: one score only, or one that the profile does not have.
    """
    if (first is None) != (second is None):
        raise OptionError("a scatter plot needs two scores: plot('mass', 'induction'); plot() draws the matrix.")
    return _matrix(profile) if first is None or second is None else _scatter(profile, first, second)


def _matrix(profile: HeadProfile) -> go.Figure:
    table = profile.rank_correlations()
    names = [name.replace("_", " ") for name in table.columns]
    values = [[None if math.isnan(v) else float(v) for v in row] for row in table.to_numpy()]
    text = [["" if v is None else f"{v:.2f}".replace("-", "−") for v in row] for row in values]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            y=names,
            zmin=-1,
            zmax=1,
            colorscale="RdBu",
            xgap=1,
            ygap=1,
            text=text,
            texttemplate="%{text}",
            hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_layout(
        title={"text": "Spearman's rho between head scores", "x": 0, "font": {"size": 14}},
        font=_FONT,
        height=90 + 44 * len(names),
        plot_bgcolor="#eef1f4",
        paper_bgcolor="white",
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(automargin=True)
    return figure


def _scatter(profile: HeadProfile, first: str, second: str) -> go.Figure:
    interval = profile.rank_correlation(first, second)
    table = profile.to_frame()
    figure = go.Figure(
        go.Scatter(
            x=table[first],
            y=table[second],
            text=table["name"],
            mode="markers",
            marker={
                "color": table["layer"],
                "colorscale": "Viridis",
                "size": 8,
                "colorbar": {"title": "layer", "thickness": 10},
            },
            hovertemplate="%{text}<br>%{x:.3g}, %{y:.3g}<extra></extra>",
        )
    )
    span = "" if math.isnan(float(interval.low)) else f" [{float(interval.low):.2f}, {float(interval.high):.2f}]"
    title = f"Spearman's rho {float(interval.estimate):.2f}{span}, {interval.label}"
    figure.update_layout(
        title={"text": title, "x": 0, "font": {"size": 14}}, font=_FONT, plot_bgcolor="#eef1f4", paper_bgcolor="white"
    )
    figure.update_xaxes(title=first.replace("_", " "))
    figure.update_yaxes(title=second.replace("_", " "))
    return figure
