"""One HTML page about plain and momentum attention, trained in pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from metaopt_lens._storage import provenance, write_text
from metaopt_lens.training import MomentumComparison
from metaopt_lens.viz._render import render

_COLOURS = {"plain": "#7f8c8d", "momentum": "#1f5fa8"}  # of those that the page brightens in the dark
_FILL = {"plain": "rgba(127,140,141,.5)", "momentum": "rgba(70,130,210,.5)"}
_LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"}


def momentum_figure(comparison: MomentumComparison, metric: str) -> go.Figure:
    """Both arms' means over seeds with every seed as a thin line, and the paired difference with its interval.

    Args:
        comparison: a finished comparison.
        metric: a value of the column `metric` in `MomentumComparison.summary`, such as ``"accuracy"``.
    """
    from plotly.subplots import make_subplots

    runs = comparison.runs()
    runs = runs[runs["metric"] == metric]
    summary = comparison.summary()
    summary = summary[summary["metric"] == metric].sort_values("at")
    by = str(summary["by"].iloc[0])
    plot = make_subplots(
        rows=2,
        cols=1,
        vertical_spacing=0.2,
        subplot_titles=("", f"{_label(comparison, 'momentum')} minus plain, 95 % interval"),
    )
    for (arm, _seed), line in runs.sort_values("at").groupby(["arm", "seed"], sort=False):
        plot.add_scatter(
            x=_text(line["at"]), y=line["value"].tolist(), mode="lines", line={"color": _FILL[str(arm)], "width": 1},
            showlegend=False, hoverinfo="skip", row=1, col=1,
        )  # fmt: skip
    for arm, colour in _COLOURS.items():
        plot.add_scatter(
            x=_text(summary["at"]), y=summary[arm].tolist(), name=_label(comparison, arm), mode="lines+markers",
            line={"color": colour},
            row=1, col=1,
        )  # fmt: skip
    mean = summary["difference"]
    plot.add_scatter(
        x=_text(summary["at"]), y=mean.tolist(), mode="markers", showlegend=False,
        marker={"color": "#1f5fa8", "size": 8},
        error_y={
            "type": "data", "symmetric": False,
            "array": (summary["high"] - mean).tolist(), "arrayminus": (mean - summary["low"]).tolist(),
        },
        row=2, col=1,
    )  # fmt: skip
    plot.add_hline(y=0, line={"color": "#9aa5b1", "dash": "dot"}, row=2, col=1)
    plot.update_xaxes(title="context length" if by == "tokens" else "demonstrations", type="category")
    plot.update_yaxes(title=metric, row=1, col=1)
    plot.update_layout(height=520, margin={"t": 40, "b": 40, "l": 50, "r": 10}, template="plotly_white", legend=_LEGEND)
    return plot


def history_figure(comparison: MomentumComparison, metric: str) -> go.Figure:
    """A metric during training, at its largest number of demonstrations or tokens: every seed, and each arm's mean."""
    history = comparison.history()
    history = history[history["metric"] == metric]
    history = history[history["at"] == history["at"].max()]
    plot = go.Figure()
    for arm, colour in _COLOURS.items():
        of_arm = history[history["arm"] == arm]
        for _, line in of_arm.groupby("seed", sort=False):
            plot.add_scatter(
                x=line["step"].tolist(), y=line["value"].tolist(), mode="lines", hoverinfo="skip", showlegend=False,
                line={"color": _FILL[arm], "width": 1},
            )  # fmt: skip
        mean = of_arm.groupby("step")["value"].mean()
        plot.add_scatter(
            x=mean.index.tolist(),
            y=mean.tolist(),
            mode="lines+markers",
            name=_label(comparison, arm),
            line={"color": colour},
        )
    what = "demonstrations" if history["by"].iloc[0] == "demos" else "tokens"
    plot.update_layout(
        legend=_LEGEND, height=320, margin={"t": 40, "b": 40, "l": 50, "r": 10}, template="plotly_white",
        xaxis_title="step", yaxis_title=f"{metric}, {history['at'].iloc[0]} {what}",
        yaxis_type="log" if metric == "perplexity" else "linear",
    )  # fmt: skip
    return plot


def loss_figure(comparison: MomentumComparison) -> go.Figure:
    """Training loss of every run, smoothed over 20 steps."""
    plot = go.Figure()
    for arm, runs in (("plain", comparison.plain), ("momentum", comparison.momentum)):
        for index, run in enumerate(runs):
            smooth = pd.Series(run.losses).rolling(20, min_periods=1).mean().iloc[::5]
            plot.add_scatter(
                x=smooth.index.tolist(), y=smooth.round(5).tolist(), mode="lines",
                name=_label(comparison, arm), legendgroup=arm, showlegend=index == 0,
                line={"color": _COLOURS[arm], "width": 1},
            )  # fmt: skip
    plot.update_layout(
        legend=_LEGEND, height=320, margin={"t": 40, "b": 40, "l": 50, "r": 10}, template="plotly_white",
        xaxis_title="step", yaxis_title="training loss",
    )  # fmt: skip
    return plot


def write_momentum_page(comparisons: Sequence[MomentumComparison], path: str | os.PathLike[str]) -> Path:
    """Write a self-contained page: every metric with its paired differences, training losses, etas, settings.

    Args:
        comparisons: finished comparisons, one section each.
        path: the file to write.

    Returns:
        The path.
    """
    html = render(
        "momentum.html.j2",
        package="metaopt_lens.training",
        heading="Plain and momentum attention, trained in pairs",
        experiments=[_experiment(comparison) for comparison in comparisons],
        provenance=provenance(),
    )
    return write_text(path, html)


def _experiment(comparison: MomentumComparison) -> dict[str, Any]:
    config, summary = comparison.config, comparison.summary()
    metrics = [str(m) for m in summary["metric"].unique() if not str(m).startswith("last training loss")]
    seconds, lags = comparison.seconds_per_step, config.momentum.lags
    return {
        "name": config.name,
        "note": config.note,
        "settings": {
            "model": f"{config.model.n_layers} layers x {config.model.n_heads} heads, d_model {config.model.d_model}, "
            f"context {config.model.n_ctx}",
            "eta": f"learned, from {config.momentum.eta:g}" if config.momentum.learned else f"{config.momentum.eta:g}",
            "average": f"a control: only the last {lags} tokens" if lags else "of all past tokens",
            "corpus": config.data.name or config.data.path or config.data.source,
            "training": f"{config.optimizer.steps} steps of {config.optimizer.batch} sequences, "
            f"lr {config.optimizer.lr:g}",
            "seeds": ", ".join(map(str, comparison.seeds)),
            "time per step": f"plain {seconds['plain']:.3f} s, momentum {seconds['momentum']:.3f} s",
        },
        "metrics": [(metric, momentum_figure(comparison, metric)) for metric in metrics],
        "histories": [
            (metric, history_figure(comparison, metric)) for metric in metrics if comparison.momentum[0].history
        ],
        "summary": summary,
        "loss": loss_figure(comparison),
        "etas": _etas(comparison) if config.momentum.learned else None,
    }


def _etas(comparison: MomentumComparison) -> pd.DataFrame:
    sizes = comparison.config.model
    names = [f"L{layer}H{head}" for layer in range(sizes.n_layers) for head in range(sizes.n_heads)]
    columns = {
        f"seed {seed}": [value for row in run.eta for value in row]
        for seed, run in zip(comparison.seeds, comparison.momentum, strict=True)
    }
    return pd.DataFrame({"head": names, **columns})


def _label(comparison: MomentumComparison, arm: str) -> str:
    lags = comparison.config.momentum.lags
    return f"last {lags} values" if lags and arm == "momentum" else arm


def _text(column: pd.Series) -> list[str]:
    return [str(value) for value in column]
