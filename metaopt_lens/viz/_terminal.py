"""Tables for the terminal (rich), and the same content as plain data (JSON)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Decomposition, DecompositionSet
from metaopt_lens.runs import LabelPrediction
from metaopt_lens.viz._table import decompositions, head_means, head_table, measure, measures, n_averaged, number

_SHOWN_DEMOS = 4  # at either end
_COLUMNS = (
    "mass",
    "meta_gradient_share",
    "fidelity",
    "total_effect_norm",
    "direct_effect_norm",
    "indirect_effect_norm",
    "position_effect_norm",
)
_SHORT = {
    "meta_gradient_share": "meta-gr.\nshare",
    "total_effect_norm": "total\neffect",
    "direct_effect_norm": "direct\neffect",
    "indirect_effect_norm": "indirect\neffect",
    "position_effect_norm": "position\neffect",
}


def heads_text(
    result: Decomposition | DecompositionSet, *, heads: Sequence[HeadRef] | None = None, top: int | None = None
) -> Group:
    """A terminal table of heads, largest meta-gradient share first, or of the heads given, in their order."""
    means = head_means(result)
    if heads is None:
        rows = means.sort_values("meta_gradient_share", ascending=False, kind="stable").head(top or len(means))
    else:
        rows = means.set_index("name").loc[[str(ref) for ref in heads]].reset_index()
    n = n_averaged(result)
    title = f"Heads by meta-gradient share ({len(rows)} of {len(means)})" if heads is None else "Heads"
    table = _table()
    for name in ("layer", "head"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = [column for column in _COLUMNS if column in measures(means)]
    for column in shown:
        table.add_column(_SHORT.get(column, measure(column).title), justify="right", no_wrap=True)
    for _, row in rows.iterrows():
        cells = [number(float(row[column])) for column in shown]
        table.add_row(str(int(row["layer"])), str(int(row["head"])), *cells)
    return _titled(title + (f", means of {n}" if n > 1 else ""), table)


def prompt_text(item: Decomposition) -> Text:
    """The prompt on one line, its labels bold, the middle left out if it is long."""
    words = Text()
    demos = item.prompt.demos
    for piece in item.prompt.pieces():
        if piece.demo is not None and _SHOWN_DEMOS <= piece.demo < len(demos) - _SHOWN_DEMOS:
            if piece.demo == _SHOWN_DEMOS and piece.kind == "input":
                words.append("… ", style="dim")
        else:
            text = " ⏎ " if piece.kind == "separator" else piece.text.replace("\n", " ⏎ ")
            words.append(text, style={"label": "bold", "separator": "dim"}.get(piece.kind, ""))
    return words


def answers_text(items: Sequence[Decomposition], answers: Sequence[LabelPrediction | None]) -> Group:
    """A terminal table of what the model answers zero-shot and in context, one row per prompt.

    The numbers are probabilities among the candidate labels of the prompt.
    """
    table = _table()
    for name in ("query", "right label", "zero-shot", "in context"):
        table.add_column(name)
    for item, answer in zip(items, answers, strict=True):
        query = escape(" ".join(item.prompt.query.split()))
        if answer is None:
            table.add_row(query, "", "[dim]fewer than two labels[/]", "")
            continue
        table.add_row(
            query,
            escape(answer.correct or "(not given)"),
            _best(answer, answer.zero_shot_answer, answer.zero_shot_shares),
            _best(answer, answer.in_context_answer, answer.in_context_shares),
        )
    return _titled("Best candidate label and its probability among the candidates", table)


def labels_text(answer: LabelPrediction) -> Group:
    """A terminal table of every candidate's probability, zero-shot and in context; the best is bold."""
    table = _table()
    table.add_column("")
    for label in answer.labels:
        table.add_column(escape(label) + (" ✓" if label == answer.correct else ""), justify="right")
    for name, best, shares in (
        ("zero-shot", answer.zero_shot_answer, answer.zero_shot_shares),
        ("in context", answer.in_context_answer, answer.in_context_shares),
    ):
        cells = [
            f"[bold]{share:.1%}[/]" if label == best else f"{share:.1%}"
            for label, share in zip(answer.labels, shares.tolist(), strict=True)
        ]
        table.add_row(name, *cells)
    return _titled("Probability among the candidate labels" + (" (✓ is right)" if answer.correct else ""), table)


def _best(answer: LabelPrediction, best: str, shares: Float[Tensor, " candidate"]) -> str:
    colour = "" if answer.correct is None else "green" if best == answer.correct else "red"
    text = f"{escape(best)} {float(shares.max()):.1%}"
    return f"[{colour}]{text}[/]" if colour else text


def _table() -> Table:
    return Table(header_style="", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)


def _titled(title: str, table: Table) -> Group:
    """Under a line of its own: rich would break a table's title at the table's width."""
    return Group("", Text(title, style="bold"), table)


def as_data(
    result: Decomposition | DecompositionSet,
    answers: Sequence[LabelPrediction | None],
    *,
    heads: Sequence[HeadRef] | None = None,
) -> dict[str, Any]:
    """Model, versions, and for every prompt its text, answers and rows of the table, ready for JSON."""
    items = decompositions(result)
    return {
        "model": dataclasses.asdict(items[0].model),
        "provenance": items[0].provenance,
        "prompts": [_prompt(item, answer, heads) for item, answer in zip(items, answers, strict=True)],
    }


def _prompt(item: Decomposition, answer: LabelPrediction | None, heads: Sequence[HeadRef] | None) -> dict[str, Any]:
    frame = head_table(item)
    if heads is not None:
        frame = frame[frame["name"].isin([str(ref) for ref in heads])]
    return {
        "text": item.prompt.text,
        "positions": list(item.positions),
        "prediction": None if answer is None else _answer(answer),
        "heads": [
            {str(key): (value.item() if hasattr(value, "item") else value) for key, value in row.items()}
            for row in frame.to_dict(orient="records")
        ],
    }


def _answer(answer: LabelPrediction) -> dict[str, Any]:
    def scores(values: Any, shares: Any) -> dict[str, Any]:
        return {
            label: {"log_prob": log_prob, "probability_among_candidates": share}
            for label, log_prob, share in zip(answer.labels, values.tolist(), shares.tolist(), strict=True)
        }

    return {
        "correct": answer.correct,
        "zero_shot": {
            "answer": answer.zero_shot_answer,
            "labels": scores(answer.zero_shot, answer.zero_shot_shares),
        },
        "in_context": {
            "answer": answer.in_context_answer,
            "labels": scores(answer.in_context, answer.in_context_shares),
        },
    }
