"""One HTML page that shows a whole decomposition and needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaopt_lens._errors import OptionError
from metaopt_lens._storage import write_text
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Answer, Decomposition, DecompositionSet
from metaopt_lens.models import ModelInfo
from metaopt_lens.runs import LabelPrediction
from metaopt_lens.viz._answers import answer_context
from metaopt_lens.viz._chosen_heads import choose_heads
from metaopt_lens.viz._found import found_context
from metaopt_lens.viz._maps import head_map
from metaopt_lens.viz._render import render
from metaopt_lens.viz._segments import demo_colour
from metaopt_lens.viz._table import decompositions, head_means, measure, measures, n_averaged
from metaopt_lens.viz._views import attention_view, token_view

_MAPS = (
    "mass",
    "meta_gradient_residual_norm",
    "fidelity",
    "zero_shot_norm",
    "meta_gradient_norm",
    "total_effect_norm",
    "direct_effect_norm",
    "indirect_effect_norm",
    "position_effect_norm",
    "indirect_and_position_norm",
)
_MANY_DEMOS, _SHORT_DEMO = 6, 68


def write_page(
    result: Decomposition | DecompositionSet,
    path: str | os.PathLike[str],
    heads: Sequence[str | HeadRef | tuple[int, int]] | None = None,
    title: str | None = None,
    *,
    predictions: Sequence[LabelPrediction | None] | None = None,
    answer: Answer | None = None,
    versus: Answer | Sequence[Answer] | None = None,
    max_prompts: int = 8,
) -> Path:
    """Write a self-contained HTML page: what the model says and which tokens and heads make it say it, then maps, views
    and a table of all heads.

    With its model at hand, knock-outs are measured for the page (see `head_effects`), on the model as it is now.

    Everything is inlined, each JavaScript library once, and the page's own policy blocks every request.

    Args:
        result: what `decompose` returned.
        path: the file to write.
        heads: heads for the token views; by default the first four of `heads()`. Give
            ``effects.ranked(4)`` where effects were measured.
        title: heading of the page; by default it names the model.
        predictions: for each prompt what the model answers (see `metaopt_lens.runs.predict_labels`), or None.
        answer: whose logit is taken apart; None for each prompt's label or, without one, the model's first choice.
        versus: whose mean logit is subtracted; None for the prompt's other candidates, ``()`` for nothing.
        max_prompts: how many prompts of a set get their own views; maps and table average over all of them.

    Returns:
        The path.

    Raises:
        HeadError: a head that the model does not have.
        OptionError: an empty set, or predictions for another number of prompts.
        PromptError: an answer of no token, or with the same first token as a rival.
    """
    items = decompositions(result)
    answers = [None] * len(items) if predictions is None else list(predictions)
    if len(answers) != len(items):
        raise OptionError(f"predictions must be one for each of the {len(items)} prompts, got {len(answers)}.")
    if max_prompts < 1:
        raise OptionError(f"max_prompts must be at least 1, got {max_prompts}.")
    refs, info, n = choose_heads(result, heads), items[0].model, n_averaged(result)
    shown = list(zip(items, answers, strict=True))[:max_prompts]
    titles = (
        ["Prompt"] if len(items) == 1 else [f"Prompt {count} of {len(items)}" for count in range(1, len(items) + 1)]
    )
    means = head_means(result)
    columns = measures(means)
    html = render(
        "decomposition.html.j2",
        heading=title or f"Attention heads of {model_name(info)}: zero-shot and meta-gradient",
        n_prompts=len(items),
        prompts=[
            _prompt(item, prediction, refs, (answer, versus), title)
            for (item, prediction), title in zip(shown, titles, strict=False)
        ],
        model=_model(info),
        processing=info.processing if info.is_processed else (),
        means=f" Means over {n} prompts or positions." if n > 1 else "",
        maps=[(column, head_map(result, column), measure(column).meaning) for column in _drawn(columns)],
        columns=[measure(column) for column in columns],
        rows=[
            {
                "order": int(row["layer"]) * 100_000 + int(row["head"]),
                "name": row["name"],
                "numbers": [float(row[column]) for column in columns],
            }
            for row in means.to_dict("records")
        ],
        provenance=items[0].provenance,
    )
    return write_text(path, html)


def model_name(info: ModelInfo) -> str:
    """The model's name; of a folder only its last part."""
    return Path(info.name).name if Path(info.name).is_absolute() else info.name


def _drawn(columns: Sequence[str]) -> list[str]:
    """The columns with a map; indirect and position effects together only where they are not known apart."""
    together = "indirect_and_position_norm" if "indirect_effect_norm" in columns else None
    return [column for column in _MAPS if column in columns and column != together]


def _model(info: ModelInfo) -> dict[str, str]:
    grouped = f" ({info.n_kv_heads} key-value heads)" if info.n_kv_heads != info.n_heads else ""
    return {
        "model": model_name(info),
        "architecture": f"{info.architecture}, seen through {info.host}",
        "attention heads": f"{info.n_layers} layers × {info.n_heads} heads{grouped}",
        "sizes": f"d_head {info.d_head}, d_model {info.d_model}, context {info.n_ctx}",
        "positions": info.positions,
        "number format": info.dtype,
        "weights": info.weights,
    }


def _prompt(
    item: Decomposition,
    prediction: LabelPrediction | None,
    refs: list[HeadRef],
    asked: tuple[Answer | None, Answer | Sequence[Answer] | None],
    title: str,
) -> dict[str, Any]:
    prompt, tokenized = item.prompt, item.tokenized
    rows: list[tuple[str, str, str, list[tuple[str, bool]]]] = []  # class, colour, name, (text, is it a label) pairs
    for piece in prompt.pieces():
        lead = piece.text[: len(piece.text) - len(piece.text.lstrip())] if piece.kind == "label" else piece.text
        parts = [(lead, False), (piece.text.lstrip(), True)] if piece.kind == "label" else [(lead, False)]
        if piece.demo is not None:
            name = f"demo {piece.demo + 1}"
            if not rows or rows[-1][2] != name:
                rows.append(("demo", demo_colour(piece.demo), name, []))
            rows[-1][3].extend(parts)
        elif piece.kind == "instruction":
            rows.append(("before", "#9aa5b1", "instruction", parts))
    longest = max(sum(len(text) for text, _ in row[3]) for row in rows)
    return {
        "title": title,
        "n_demos": len(tokenized.demos),
        "n_demo_tokens": len(tokenized.demonstrations),
        "n_query_tokens": len(tokenized.query),
        "notes": [note for note in (tokenized.bos_note, tokenized.warning) if note],
        "position": None if item.keep_position_axis else item.positions[0],
        "token": tokenized.tokens[item.positions[0]].strip() or "␣",
        "pieces": [(*row[:3], _stripped(row[3])) for row in rows],
        "many": len(rows) > _MANY_DEMOS and longest < _SHORT_DEMO,
        "query": [(prompt.pieces()[-1].text.rstrip(), False)],
        "answer": None if prediction is None else answer_context(prediction),
        "found": found_context(item, prediction, *asked),
        "found_title": "What was found" if title == "Prompt" else f"{title}: what was found",
        "attention": attention_view(item, refs).html,
        "shares": token_view(item, refs).html,
    }


def _stripped(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Without white space at the end, where no label stands there."""
    while parts and not parts[-1][1] and not parts[-1][0].strip():
        parts = parts[:-1]
    return parts if parts[-1][1] else [*parts[:-1], (parts[-1][0].rstrip(), False)]
