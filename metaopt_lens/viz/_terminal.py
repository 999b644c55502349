"""Tables for the terminal (rich), and the same content as plain data (JSON)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Decomposition, DecompositionSet
from metaopt_lens.runs import LabelPrediction
from metaopt_lens.viz._answers import answer_data
from metaopt_lens.viz._table import decompositions, head_means, head_table, measure, measures, n_averaged, number
from metaopt_lens.viz._text import terminal_table, titled

_SHOWN_DEMOS = 4  # at either end
_COLUMNS = (
    "mass",
    "meta_gradient_residual_norm",
    "fidelity",
    "total_effect_norm",
    "direct_effect_norm",
    "indirect_effect_norm",
    "position_effect_norm",
)
_SHORT = {
    "meta_gradient_residual_norm": "|meta-gr.\n·W_O|",
    "total_effect_norm": "total\neffect",
    "direct_effect_norm": "direct\neffect",
    "indirect_effect_norm": "indirect\neffect",
    "position_effect_norm": "position\neffect",
}


def heads_text(
    result: Decomposition | DecompositionSet, *, heads: Sequence[HeadRef] | None = None, top: int | None = None
) -> Group:
    """A terminal table of heads, in the order of `Decomposition.heads`, or of the heads given, in their order.

    Args:
        result: what `decompose` returned.
        heads: the rows, in this order; None for all.
        top: at most so many rows; None for all.
    """
    means = head_means(result)
    shown_heads = result.heads(top) if heads is None else heads
    rows = means.set_index("name").loc[[str(ref) for ref in shown_heads]].reset_index()
    n = n_averaged(result)
    order = f"Heads by |meta-gradient| in the residual stream ({len(rows)} of {len(means)})"
    title = order if heads is None else "Heads"
    table = terminal_table()
    for name in ("layer", "head"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = [column for column in _COLUMNS if column in measures(means)]
    for column in shown:
        table.add_column(_SHORT.get(column, measure(column).title), justify="right", no_wrap=True)
    for _, row in rows.iterrows():
        cells = [number(float(row[column])) for column in shown]
        table.add_row(str(int(row["layer"])), str(int(row["head"])), *cells)
    return titled(title + (f", means of {n}" if n > 1 else ""), table)


def prompt_text(item: Decomposition) -> Text:
    """The prompt on one line, its labels bold, the middle left out if it is long.

    Args:
        item: one decomposition.
    """
    words = Text()
    demos = item.prompt.demos
    for piece in item.prompt.pieces():
        if piece.demo is not None and _SHOWN_DEMOS <= piece.demo < len(demos) - _SHOWN_DEMOS:
            if piece.demo == _SHOWN_DEMOS and piece.kind == "input":
                words.append("… ", style="dim")
        else:
            text = " ⏎ " if piece.kind == "separator" and piece.text else piece.text.replace("\n", " ⏎ ")
            words.append(text, style={"label": "bold", "separator": "dim"}.get(piece.kind, ""))
    return words


def as_data(
    result: Decomposition | DecompositionSet,
    answers: Sequence[LabelPrediction],
    *,
    heads: Sequence[HeadRef] | None = None,
) -> dict[str, Any]:
    """Model, versions, and for every prompt its text, answers and rows of the table, ready for JSON.

    Args:
        result: what `decompose` returned.
        answers: what the model answers to each prompt.
        heads: the rows, in this order; None for all.
    """
    items = decompositions(result)
    return {
        "model": dataclasses.asdict(items[0].model),
        "provenance": items[0].provenance,
        "prompts": [_prompt(item, answer, heads) for item, answer in zip(items, answers, strict=True)],
    }


def _prompt(item: Decomposition, answer: LabelPrediction, heads: Sequence[HeadRef] | None) -> dict[str, Any]:
    frame = head_table(item)
    if heads is not None:
        frame = frame[frame["name"].isin([str(ref) for ref in heads])]
    return {
        "text": item.prompt.text,
        "positions": list(item.positions),
        "prediction": answer_data(answer),
        "heads": [
            {str(key): (value.item() if hasattr(value, "item") else value) for key, value in row.items()}
            for row in frame.to_dict(orient="records")
        ],
    }
