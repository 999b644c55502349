"""circuitsvis: tokens coloured by a head's attention, or by their share of its meta-gradient."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._storage import write_text
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Decomposition
from metaopt_lens.viz._assets import page, standalone
from metaopt_lens.viz._heads import choose_heads
from metaopt_lens.viz._segments import Segment, segments, visible_token
from metaopt_lens.viz._table import number

_POSITIVE, _NEGATIVE = "#1d5fbf", "#c2410c"
_SMALLEST_SCALE = 1e-9  # a scale of 0 has no colours


@dataclass(frozen=True)
class View:
    """A picture made of HTML. A notebook shows it by itself; `save` writes it as a page that needs no network.

    Attributes:
        title: what it shows; html: the markup alone, without style sheet and JavaScript.
    """

    title: str
    html: str

    def _repr_html_(self) -> str:
        return standalone(self.html)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained HTML file and return its path."""
        return write_text(path, page(self.title, f"<h1>{escape(self.title)}</h1>{self.html}", with_plotly=False))


def attention_view(result: Decomposition, heads: Sequence[str | HeadRef | tuple[int, int]] | None = None) -> View:
    """Attention of chosen heads over the tokens, one row per demonstration with what it gets in sum.

    A decomposition holds the attention of its destinations only (the last token, or all of the query), so that
    is what is shown; several destinations are behind tabs.

    Args:
        heads: heads such as ``"L3H7"``; by default the first four of `heads()`.

    Raises:
        HeadError: a head that the model does not have.
    """
    cards = []
    for ref in choose_heads(result, heads):
        panels = []
        for index in range(len(result.positions)):
            row = result.runs.icl.pattern[index, ref.layer, ref.head]
            sink = float(result.runs.icl.sink[index, ref.layer, ref.head])
            panels.append(_panel(result, index, row, signed=False, shown=segments(result.tokenized), sink=sink))
        cards.append(_card(ref, result, panels, _attention_note(result, ref)))
    return View("Attention over the tokens", _cards(cards))


def token_view(
    result: Decomposition,
    heads: Sequence[str | HeadRef | tuple[int, int]] | None = None,
    *,
    form: Literal["softmax", "linear"] = "softmax",
) -> View:
    """Demonstration tokens coloured by their signed share of a head's meta-gradient (`Decomposition.token_shares`).

    Args:
        heads: heads such as ``"L3H7"``; by default the first four of `heads()`.
        form: ``"softmax"`` for the exact split, ``"linear"`` for the relaxed one.

    Raises:
        HeadError: a head that the model does not have.
    """
    demos = [segment for segment in segments(result.tokenized) if segment.kind == "demo"]
    cards = []
    for ref in choose_heads(result, heads):
        shares = result.token_shares(ref.layer, ref.head, form)
        rows = shares if result.keep_position_axis else shares[None]
        panels = [_panel(result, index, row, signed=True, shown=demos, sink=0.0) for index, row in enumerate(rows)]
        cards.append(_card(ref, result, panels, _share_note(result, ref)))
    return View("Share of the tokens in the meta-gradient", _cards(cards))


def _cards(cards: list[str]) -> str:
    return f'<div class="ml-cards">{"".join(cards)}</div>'


def _card(ref: HeadRef, result: Decomposition, panels: list[str], note: str) -> str:
    tabs = ""
    if len(panels) > 1:
        buttons = [
            f'<button type="button" data-panel="{i}" aria-pressed="{"true" if i == len(panels) - 1 else "false"}">'
            f"{escape(visible_token(result.tokenized.tokens[p]).strip() or '␣')}</button>"
            for i, p in enumerate(result.positions)
        ]
        tabs = f'<div class="ml-tabs"><span>from</span>{"".join(buttons)}</div>'
    return (
        f'<figure class="ml-card" data-head="{ref}"><figcaption><b>{ref}</b><span>{note}</span></figcaption>'
        f"{tabs}{''.join(panels)}</figure>"
    )


def _panel(
    result: Decomposition,
    index: int,
    row: Float[Tensor, " src"],
    *,
    signed: bool,
    shown: list[Segment],
    sink: float,
) -> str:
    """The rows of one destination; only the last is open at first."""
    values = [round(float(v), 6) for v in row.detach().float().cpu()]
    largest = max(max(abs(v) for s in shown for v in values[s.span.slice]), _SMALLEST_SCALE)
    sums = [sum(values[s.span.slice]) for s in shown]
    widest = max(max(abs(v) for v in sums), sink, _SMALLEST_SCALE)
    rows = [
        _row(s.name, s.kind, s.colour, _tokens(result, s, values, largest, signed=signed), total, widest)
        for s, total in zip(shown, sums, strict=True)
    ]
    if sink > 0:
        rows.append(_row("sink", "before", "#9aa5b1", "<i>(no token)</i>", sink, widest))
    hidden = "" if index == len(result.positions) - 1 else " hidden"
    return f'<div class="ml-panel" data-panel="{index}"{hidden}>{"".join(rows)}</div>'


def _row(name: str, kind: str, colour: str, content: str, total: float, widest: float) -> str:
    sign = "minus" if total < 0 else "plus"
    width = 100 * abs(total) / widest
    return (
        f'<div class="ml-row ml-{kind}" style="--band:{colour}"><span class="ml-tag">{name}</span>{content}'
        f'<span class="ml-sum ml-{sign}" style="--w:{width:.1f}%">{number(total)}</span></div>'
    )


def _tokens(result: Decomposition, segment: Segment, values: list[float], largest: float, *, signed: bool) -> str:
    tokens = [visible_token(token) for token in result.tokenized.tokens[segment.span.slice]]
    props = {
        "tokens": [_inert(token) for token in tokens],
        "values": values[segment.span.slice],
        "minValue": -largest if signed else 0,
        "maxValue": largest,
        "positiveColor": _POSITIVE,
        "negativeColor": _NEGATIVE,
    }
    data = escape(json.dumps(props, ensure_ascii=False), quote=True)
    # The text inside is what a reader without JavaScript sees; circuitsvis replaces it.
    return f'<div class="ml-cv" data-element="ColoredTokens" data-props="{data}">{escape(" ".join(tokens))}</div>'


def _inert(token: str) -> str:
    """circuitsvis sets tokens as HTML: a zero-width space keeps ``<bos>`` and ``&amp;`` from being read as markup."""
    return token.replace("<", "<\u200b").replace("&", "&\u200b")


def _attention_note(result: Decomposition, ref: HeadRef) -> str:
    mass = result.runs.icl.pattern[-1, ref.layer, ref.head, result.demonstrations.slice].detach().float().sum()
    return f"mass on demonstrations {float(mass):.3f}{_from(result)}"


def _share_note(result: Decomposition, ref: HeadRef) -> str:
    parts = result.softmax
    pick = (-1, ref.layer, ref.head) if result.keep_position_axis else (ref.layer, ref.head)
    norm, z_norm = float(parts.meta_gradient[pick].norm()), float(parts.z[pick].norm())
    return f"|meta-gradient| {norm:.3g} of |z| {z_norm:.3g}{_from(result)}"


def _from(result: Decomposition) -> str:
    token = visible_token(result.tokenized.tokens[result.positions[-1]]).strip() or "␣"
    return f" at the {'last ' if len(result.positions) > 1 else ''}token <code>{escape(token)}</code>"
