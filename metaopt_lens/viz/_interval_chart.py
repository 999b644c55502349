"""Values with their intervals as rows of a table: a browser draws it without a script, a screen reader reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5)
_MOST_TICKS = 5


@dataclass(frozen=True)
class Row:
    """A value, or a null next to it.

    Attributes:
        name: in words.
        value: NaN where it is not defined.
        low, high: of its 95 % interval; NaN where there is none.
        kind: ``value`` is drawn strong, ``null`` quiet.
        about: what the last column says, such as an answer.
    """

    name: str
    value: float
    low: float
    high: float
    kind: Literal["value", "null"] = "null"
    about: str = ""


def interval_chart(
    title: str,
    unit: str,
    rows: Sequence[Row],
    *,
    about: str = "",
    percent: bool = False,
    reference: tuple[float, str] | None = None,
) -> dict[str, Any]:
    """What ``interval_chart.html.j2`` draws.

    Args:
        title: caption of the table.
        unit: what the numbers are.
        rows: in order; those without a value say so.
        about: heading of the last column; empty for none.
        percent: shares from 0 to 1, written in percent on a whole scale; otherwise numbers between -1 and 1.
        reference: where a line across all rows stands, and its name.
    """
    known = [x for row in rows for x in (row.value, row.low, row.high) if x == x]
    unknown = any(row.value == row.value and row.low != row.low for row in rows)
    low, high = (0.0, 1.0) if percent else _ends([*known, 0.0])
    place = _Place(low, high)
    step = 0.25 if percent else _step(high - low)
    first = math.ceil(low / step - 1e-9)
    ticks = [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]
    write = _percent if percent else _signed
    return {
        "title": title,
        "unit": unit + ("; no interval: all sets agree, or there is only one" if unknown else ""),
        "about": about,
        "ticks": [(place(tick), f"{100 * tick:.0f} %" if percent else _tick(tick, step)) for tick in ticks],
        "line": None if reference is None else (place(reference[0]), reference[1]),
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "about": row.about,
                "at": None if row.value != row.value else place(row.value),
                "left": None if row.low != row.low else place(row.low),
                "width": None if row.low != row.low else place(row.high) - place(row.low),
                "value": "not defined" if row.value != row.value else write(row.value),
                "interval": "" if row.value != row.value else _interval(row, write),
            }
            for row in rows
        ],
    }


@dataclass(frozen=True)
class _Place:
    """Where a number stands on a scale, in percent of its width; what lies outside stands at the end."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        return 100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a scale that holds the values, at whole steps: those of a cosine at most."""
    low, high = max(min(values), -1.0), min(max(values), 1.0)
    step = _step(max(high - low, _STEPS[0]))
    return step * math.floor(low / step), max(step * math.ceil(high / step), step)


def _step(width: float) -> float:
    return next((step for step in _STEPS if width / step <= _MOST_TICKS), _STEPS[-1])


def _tick(value: float, step: float) -> str:
    return f"{value:.{2 if step < 0.1 or step == 0.25 else 1}f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _interval(row: Row, write: Any) -> str:
    if row.low != row.low:
        return "no interval"
    return f"{write(row.low)} to {write(row.high)}"
