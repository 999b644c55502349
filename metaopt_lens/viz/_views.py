"""circuitsvis: tokens coloured by a head's attention, or by their share of its meta-gradient."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._plots import draws
from metaopt_lens._storage import write_text
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Decomposition
from metaopt_lens.viz._chosen_heads import choose_heads
from metaopt_lens.viz._render import render
from metaopt_lens.viz._segments import Segment, segments, visible_token

_POSITIVE, _NEGATIVE = "#6fa3ea", "#e58e68"  # light enough that circuitsvis keeps its text black
_SMALLEST_SCALE = 1e-9  # a scale of 0 has no colours


@dataclass(frozen=True)
class View:
    """A picture made of HTML. A notebook shows it by itself; `save` writes it as a page that needs no network.

    Attributes:
        title: what it shows.
        html: the markup alone, without style sheet and JavaScript.
    """

    title: str
    html: str

    def _repr_html_(self) -> str:
        return render("notebook.html.j2", view=self.html)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained HTML file and return its path.

        Args:
            path: the HTML file.
        """
        return write_text(path, render("view.html.j2", heading=self.title, view=self.html))


@draws(Decomposition, "attention_view")
def attention_view(result: Decomposition, heads: Sequence[str | HeadRef | tuple[int, int]] | None = None) -> View:
    """Attention of chosen heads over the tokens, one row per demonstration with what it gets in sum.

    A decomposition holds the attention of its destinations only (the last token, or all of the query), so that
    is what is shown; several destinations are behind tabs.

    Args:
        result: what `decompose` returned for one prompt.
        heads: heads such as ``"L3H7"``; by default the first four of `heads()`.

    Raises:
        HeadError: a head that the model does not have.
    """
    run, shown = result.runs.icl, segments(result.tokenized)
    cards = []
    for ref in choose_heads(result, heads):
        mass = run.pattern[-1, ref.layer, ref.head, result.demonstrations.slice].detach().float().sum()
        panels = [
            _panel(result, pattern[ref.layer, ref.head], shown, sink=float(sink[ref.layer, ref.head]))
            for pattern, sink in zip(run.pattern, run.sink, strict=True)
        ]
        cards.append({"head": str(ref), "note": f"mass on demonstrations {float(mass):.3f}", "panels": panels})
    return View("Attention over the tokens", _cards(result, cards))


@draws(Decomposition, "token_view")
def token_view(
    result: Decomposition,
    heads: Sequence[str | HeadRef | tuple[int, int]] | None = None,
    form: Literal["softmax", "linear"] = "softmax",
) -> View:
    """Demonstration tokens coloured by their signed share of a head's meta-gradient (`Decomposition.token_shares`).

    Args:
        result: what `decompose` returned for one prompt.
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
        panels = [_panel(result, row, demos, signed=True) for row in rows]
        cards.append({"head": str(ref), "note": _share_note(result, ref), "panels": panels})
    return View("Share of the tokens in the meta-gradient", _cards(result, cards))


def _cards(result: Decomposition, cards: list[dict[str, Any]]) -> str:
    tokens = [visible_token(result.tokenized.tokens[position]).strip() or "␣" for position in result.positions]
    return render("cards.html.j2", cards=cards, tokens=tokens)


def _panel(
    result: Decomposition,
    row: Float[Tensor, " src"],
    shown: list[Segment],
    *,
    signed: bool = False,
    sink: float = 0.0,
) -> list[dict[str, Any]]:
    """The rows of one destination: name, colour, tokens with their values, and the sum."""
    values = [round(float(v), 6) for v in row.detach().float().cpu()]
    largest = max(max(abs(v) for s in shown for v in values[s.span.slice]), _SMALLEST_SCALE)
    rows: list[dict[str, Any]] = []
    for segment in shown:
        tokens = [visible_token(token) for token in result.tokenized.tokens[segment.span.slice]]
        own = values[segment.span.slice]
        props = {
            "tokens": [_inert(token) for token in tokens],
            "values": own,
            "minValue": -largest if signed else 0,
            "maxValue": largest,
            "positiveColor": _POSITIVE,
            "negativeColor": _NEGATIVE,
        }
        about = {"name": segment.name, "kind": segment.kind, "colour": segment.colour, "text": " ".join(tokens)}
        rows.append({**about, "props": json.dumps(props, ensure_ascii=False), "total": sum(own)})
    if sink > 0:
        about = {"name": "sink", "kind": "before", "colour": "#9aa5b1", "text": "(no token)"}
        rows.append({**about, "props": None, "total": sink})
    widest = max(max(abs(row["total"]) for row in rows), _SMALLEST_SCALE)
    return [{**row, "width": 100 * abs(row["total"]) / widest} for row in rows]


def _inert(token: str) -> str:
    """circuitsvis sets tokens as HTML: a zero-width space keeps ``<bos>`` and ``&amp;`` from being read as markup."""
    return token.replace("<", "<\u200b").replace("&", "&\u200b")


def _share_note(result: Decomposition, ref: HeadRef) -> str:
    parts = result.softmax
    pick = (-1, ref.layer, ref.head) if result.keep_position_axis else (ref.layer, ref.head)
    norm, z_norm = float(parts.meta_gradient[pick].norm()), float(parts.z[pick].norm())
    return f"|meta-gradient| {norm:.3g} of |z| {z_norm:.3g}"
