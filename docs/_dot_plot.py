"""A small SVG of estimates with their intervals, one line each; dark on white, so that it reads on any background."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_LINE, _TOP, _LABEL, _PLOT, _EDGE = 18, 14, 370, 380, 20
_INK, _SOFT, _GRID = "#1f2933", "#6b7683", "#d7dce1"
_FONT = "font-family='system-ui, sans-serif' font-size='12'"


class Dot(NamedTuple):
    """A line of the picture; `filled` where it is decided. Without an interval low and high are NaN."""

    label: str
    estimate: float
    low: float
    high: float
    filled: bool = True


def dot_plot(dots: Sequence[Dot], axis: str, *, reference: float = 0.0) -> str:
    """Dots and intervals around a line at `reference`.

    Args:
        dots: from top to bottom; those without an estimate are left out.
        axis: what is measured, with its unit.
        reference: where the null is.
    """
    known = [dot for dot in dots if math.isfinite(dot.estimate)]
    ends = [v for dot in known for v in (dot.low, dot.estimate, dot.high) if math.isfinite(v)]
    low, high = min([*ends, reference]), max([*ends, reference])
    margin = 0.05 * (high - low or 1.0)
    low, high = low - margin, high + margin
    width, bottom = _LABEL + _PLOT + _EDGE, _TOP + _LINE * len(known)

    def x(value: float) -> str:
        return f"{_LABEL + _PLOT * (value - low) / (high - low):.1f}"

    parts = [f"<rect width='{width}' height='{bottom + 44}' rx='6' fill='#ffffff'/>"]
    for value in _ticks(low, high):
        at = x(value)
        parts.append(f"<line x1='{at}' x2='{at}' y1='{_TOP - 6}' y2='{bottom}' stroke='{_GRID}'/>")
        parts.append(f"<text x='{at}' y='{bottom + 16}' text-anchor='middle' fill='{_SOFT}'>{value:g}</text>")
    at = x(reference)
    parts.append(f"<line x1='{at}' x2='{at}' y1='{_TOP - 6}' y2='{bottom}' stroke='{_INK}' stroke-width='1.5'/>")
    for number, dot in enumerate(known):
        y = _TOP + _LINE * (number + 0.5)
        ink = _INK if dot.filled else _SOFT
        parts.append(f"<text x='{_LABEL - 10}' y='{y + 4}' text-anchor='end' fill='{ink}'>{escape(dot.label)}</text>")
        if math.isfinite(dot.low) and math.isfinite(dot.high):
            ends_at = f"x1='{x(dot.low)}' x2='{x(dot.high)}'"
            parts.append(f"<line {ends_at} y1='{y}' y2='{y}' stroke='{ink}' stroke-width='2'/>")
        fill = ink if dot.filled else "#ffffff"
        parts.append(f"<circle cx='{x(dot.estimate)}' cy='{y}' r='4' fill='{fill}' stroke='{ink}' stroke-width='1.5'/>")
    parts.append(f"<text x='{_LABEL}' y='{bottom + 36}' fill='{_INK}'>{escape(axis)}</text>")
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {bottom + 44}' width='{width}' {_FONT}>"
    return "\n".join([head, f"<title>{escape(axis)}</title>", *parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(high - low))
    while (high - low) / step < 4:
        step /= 2
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
