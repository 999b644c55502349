"""Pages are jinja2 templates with everything inlined: style sheet, circuitsvis (from its pip package), plotly."""

from __future__ import annotations

import json
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
_LONG = 24  # characters
_DEFAULT_HEIGHT = 450  # plotly's own, in pixels


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
        "long_columns": _long_columns,
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


def _long_columns(frame: pd.DataFrame) -> list[bool]:
    """Whether a column holds sentences, which are set flush left."""
    return [any(len(str(value)) > _LONG for value in column if isinstance(value, str)) for _, column in frame.items()]


def _plot(figure: go.Figure, name: str, about: str) -> Markup:
    """A plotly figure as data: the page's script draws it once it can be seen, in the colours of the reader's theme.

    Args:
        figure: what to draw.
        name: unique on the page.
        about: what a screen reader says it is.
    """
    found = json.loads(figure.to_json())
    found["layout"].pop("template", None)
    text = json.dumps(_four_digits({"data": found["data"], "layout": found["layout"]}), separators=(",", ":"))
    data = Markup(text.replace("<", "\\u003c"))
    height = figure.layout.height or _DEFAULT_HEIGHT
    return Markup(
        '<div class="ml-plot" id="ml-{}" role="img" aria-label="{}" style="min-height:{}px">'
        '<script type="application/json">{}</script></div>'
    ).format(name, about, height, data)


def _four_digits(value: Any) -> Any:
    """Numbers as a picture needs them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_four_digits(one) for one in value]
    return {key: _four_digits(one) for key, one in value.items()} if isinstance(value, dict) else value


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
