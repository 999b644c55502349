"""Pieces of HTML that all pages are put together from."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

_PLOT_OPTIONS = {"displaylogo": False, "displayModeBar": False, "responsive": True}


def section(title: str, body: str, note: str = "") -> str:
    """A titled part of the page; the note is HTML."""
    quiet = f'<p class="ml-quiet">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{quiet}{body}</section>"


def facts(items: Mapping[str, str]) -> str:
    """Name-value pairs; both are HTML."""
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items.items()) + "</dl>"


def figure(plot: go.Figure, name: str, caption: str = "") -> str:
    """A plotly figure; the page carries the library once. `name` must be unique on the page."""
    html = plot.to_html(full_html=False, include_plotlyjs=False, div_id=f"ml-{name}", config=_PLOT_OPTIONS)
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{html}{text}</figure>"


def sortable_table(frame: pd.DataFrame, *, digits: int = 3) -> str:
    """A table whose columns sort on a click."""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in frame.columns)
    rows = "".join("<tr>" + "".join(_cell(v, digits) for v in row) + "</tr>" for row in frame.itertuples(index=False))
    return (
        f'<div class="ml-scroll"><table class="ml-sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(value: Any, digits: int) -> str:
    if pd.isna(value):
        return '<td data-order="-inf">–</td>'
    if isinstance(value, float | np.floating):
        return f'<td data-order="{float(value)!r}">{value:.{digits}f}</td>'
    return f'<td data-order="{escape(str(value), quote=True)}">{escape(str(value))}</td>'
