"""Pages are jinja2 templates with everything inlined: style sheet, circuitsvis (from its pip package), plotly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metaopt_lens.viz._table import number, signed

_HERE = "metaopt_lens.viz"
_PLOT_OPTIONS = {"displaylogo": False, "displayModeBar": False, "responsive": True}


def render(template: str, *, package: str = _HERE, **values: Any) -> str:
    """Fill a template of a package; its templates may extend and import those of `metaopt_lens.viz`.

    Args:
        template: file name in the package's ``templates`` folder.
        package: the package that holds it.
        values: what the template reads; a name that is missing is an error.

    Returns:
        HTML in which every value is escaped, except those that are markup already.
    """
    return _environment(package).get_template(template).render(**values)


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, _HERE))]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "percent": "{:.1%}".format,
        "plot": _plot,
        "cell": _cell,
        "words": words,
        "number": number,
        "signed": signed,
    }
    environment.globals |= {"asset": _asset, "circuitsvis_js": _circuitsvis_js, "plotly_js": _plotly_js}
    return environment


def words(name: object) -> str:
    """A column or metric by its words instead of its identifier; the ends of intervals are "from" and "to"."""
    *first, last = str(name).split("_")
    return " ".join([*first, {"low": "from", "high": "to"}.get(last, last)])


@dataclass(frozen=True)
class Measured:
    """A table's value with its interval, shown in one cell; NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Cell:
    order: str
    text: str
    interval: str = ""


def _cell(value: Any) -> _Cell:
    """What a table's cell sorts by, and what it shows."""
    if isinstance(value, Measured):
        inner = _cell(value.value)
        if value.value != value.value:
            return inner
        interval = "no interval" if pd.isna(value.low) else f"{value.low:.3f} to {value.high:.3f}"
        return _Cell(inner.order, inner.text, interval)
    if pd.isna(value):
        return _Cell("-inf", "–")
    if isinstance(value, float | np.floating):
        return _Cell(repr(float(value)), f"{value:.3f}")
    return _Cell(str(value), str(value))


def _plot(figure: go.Figure, name: str) -> Markup:
    """A plotly figure as markup; the page carries the library once. `name` must be unique on the page."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"ml-{name}", config=_PLOT_OPTIONS))


@cache
def _circuitsvis_js() -> Markup:
    """The bundle that defines the global `CircuitsVis`, safe inside a script element."""
    text = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    return _script(text.partition("//# sourceMappingURL=")[0])


@cache
def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs

    return _script(str(get_plotlyjs()))


def _script(code: str) -> Markup:
    return Markup(code.replace("</script", "<\\/script"))


@cache
def _asset(name: str) -> Markup:
    return Markup((files(_HERE) / "assets" / name).read_text(encoding="utf-8"))
