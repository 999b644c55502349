"""One HTML page that shows a whole decomposition and needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from metaopt_lens._errors import OptionError
from metaopt_lens._storage import write_text
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Decomposition, DecompositionSet
from metaopt_lens.models import ModelInfo
from metaopt_lens.runs import LabelPrediction
from metaopt_lens.viz._answers import answer_html
from metaopt_lens.viz._assets import page
from metaopt_lens.viz._heads import choose_heads
from metaopt_lens.viz._html import facts, figure, section
from metaopt_lens.viz._maps import head_map
from metaopt_lens.viz._segments import demo_colour
from metaopt_lens.viz._table import decompositions, head_means, measure, measures, n_averaged, number
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
_MANY_DEMOS = 6


def write_page(
    result: Decomposition | DecompositionSet,
    path: str | os.PathLike[str],
    heads: Sequence[str | HeadRef | tuple[int, int]] | None = None,
    title: str | None = None,
    *,
    predictions: Sequence[LabelPrediction | None] | None = None,
    max_prompts: int = 8,
) -> Path:
    """Write a self-contained HTML page: prompt, layer x head maps, token views, table of all heads.

    Everything is inlined, each JavaScript library once, and the page forbids itself to load anything.

    Args:
        result: what `decompose` returned.
        path: the file to write.
        heads: heads for the token views; by default the first four of `heads()`. Give
            ``effects.ranked(4)`` where effects were measured.
        title: heading of the page; by default it names the model.
        predictions: for each prompt what the model answers (see `metaopt_lens.runs.predict_labels`), or None.
        max_prompts: how many prompts of a set get their own views; maps and table average over all of them.

    Returns:
        The path.

    Raises:
        HeadError: a head that the model does not have.
        OptionError: an empty set, or predictions for another number of prompts.
    """
    items = decompositions(result)
    answers = [None] * len(items) if predictions is None else list(predictions)
    if len(answers) != len(items):
        raise OptionError(f"predictions must be one for each of the {len(items)} prompts, got {len(answers)}.")
    if max_prompts < 1:
        raise OptionError(f"max_prompts must be at least 1, got {max_prompts}.")
    refs = choose_heads(result, heads)
    heading = title or f"Attention heads of {model_name(items[0].model)}: zero-shot and meta-gradient"
    shown = items[:max_prompts]
    body = [_lead(heading)]
    if len(items) == 1:
        body += [_prompt(items[0], answers[0], "Prompt"), _model(items[0]), _maps(result), _views(items[0], refs)]
    else:
        body += [_model(items[0]), _maps(result)]
        for count, (item, answer) in enumerate(zip(shown, answers, strict=False), start=1):
            body += [_prompt(item, answer, f"Prompt {count} of {len(items)}"), _views(item, refs)]
    if len(items) > len(shown):
        body.append(
            f'<p class="ml-notice">{len(items) - len(shown)} more prompts are not shown one by one; maps and table '
            "count them.</p>"
        )
    body += [_table(result), _provenance(items[0])]
    return write_text(path, page(heading, "\n".join(body), with_plotly=True))


def model_name(info: ModelInfo) -> str:
    """The model's name; of a folder only its last part."""
    return Path(info.name).name if Path(info.name).is_absolute() else info.name


def _lead(heading: str) -> str:
    return (
        f"<header><h1>{escape(heading)}</h1>"
        "<p>The output z of an attention head is a weighted sum over the tokens it attends to, so it splits exactly "
        "into a part read from the query (with what stands before the demonstrations) and a part read from the "
        "demonstrations. That second part, the <em>meta-gradient</em>, is what the demonstrations add at this head; "
        "whether it acts like a step of gradient descent (arXiv:2212.10559) is the question.</p>"
        '<div class="ml-formula">z = zero_shot + meta_gradient</div></header>'
    )


def _model(item: Decomposition) -> str:
    info = item.model
    grouped = f" ({info.n_kv_heads} key-value heads)" if info.n_kv_heads != info.n_heads else ""
    about = {
        "model": escape(model_name(info)),
        "architecture": f"{escape(info.architecture)}, seen through {escape(info.host)}",
        "attention heads": f"{info.n_layers} layers × {info.n_heads} heads{grouped}",
        "sizes": f"d_head {info.d_head}, d_model {info.d_model}, context {info.n_ctx}",
        "positions": escape(info.positions),
        "number format": escape(info.dtype),
        "weights": escape(info.weights),
    }
    notice = ""
    if info.is_processed:
        notice = (
            f'<p class="ml-notice"><b>Processed weights:</b> {escape(" and ".join(info.processing))}. The zero-shot '
            "and meta-gradient parts shown here are those of the folded weights, not of the original "
            "parametrisation.</p>"
        )
    return section("Model", facts(about) + notice)


def _prompt(item: Decomposition, answer: LabelPrediction | None, title: str) -> str:
    prompt, tokenized = item.prompt, item.tokenized
    rows: list[tuple[str, str, str, str]] = []  # class, colour, name, html
    texts: dict[int, list[str]] = {}
    for piece in prompt.pieces():
        text = escape(piece.text)
        if piece.kind == "label":
            lead = text[: len(text) - len(text.lstrip())]
            text = f"{lead}<mark>{text.lstrip()}</mark>"
        if piece.demo is not None:
            texts.setdefault(piece.demo, []).append(text)
        elif piece.kind == "instruction":
            rows.append(("before", "#9aa5b1", "instruction", text.rstrip()))
    rows += [("demo", demo_colour(i), f"demo {i + 1}", "".join(parts).rstrip()) for i, parts in texts.items()]
    many = " ml-many" if len(rows) > _MANY_DEMOS and max(len(row[3]) for row in rows) < 80 else ""
    blocks = "".join(_piece(*row) for row in rows)
    query = _piece("query", "#1f2933", "query", escape(prompt.pieces()[-1].text.rstrip()))
    bos = "".join(f" {escape(note)}" for note in (tokenized.bos_note, tokenized.warning) if note)
    token = escape(tokenized.tokens[item.positions[0]].strip() or "␣")
    where = (
        "every token of the query"
        if item.keep_position_axis
        else f"position {item.positions[0]}, the token <code>{token}</code>"
    )
    note = (
        f"{len(tokenized.demos)} demonstrations in {len(tokenized.demonstrations)} tokens (labels underlined), then a "
        f"query of {len(tokenized.query)}.{bos} Heads are read at {where}."
    )
    body = f'<div class="ml-prompt{many}">{blocks}</div><div class="ml-prompt">{query}</div>'
    return section(title, body + ("" if answer is None else answer_html(answer)), note)


def _piece(kind: str, colour: str, name: str, text: str) -> str:
    return f'<div class="ml-piece ml-{kind}" style="--band:{colour}"><span>{name}</span><pre>{text}</pre></div>'


def _maps(result: Decomposition | DecompositionSet) -> str:
    available = measures(head_means(result))
    if "indirect_effect_norm" in available:
        available.remove("indirect_and_position_norm")  # shown apart
    figures = [
        figure(head_map(result, column), f"map-{column}", measure(column).meaning)
        for column in _MAPS
        if column in available
    ]
    n = n_averaged(result)
    mean = f" Means over {n} prompts or positions." if n > 1 else ""
    return section("All heads", f'<div class="ml-maps">{"".join(figures)}</div>', f"Hover for the number.{mean}")


def _views(item: Decomposition, refs: list[HeadRef]) -> str:
    attention = section(
        "Attention",
        attention_view(item, refs).html,
        "What a head attends to from the query: darkest is the head's largest value, hover for the number. At the "
        "right, the sum over each row.",
    )
    shares = section(
        "Where the meta-gradient comes from",
        token_view(item, refs).html,
        "Each token's signed share of the head's meta-gradient (its part projected on the whole): blue for, "
        "red against. The shares of all demonstrations sum to 1.",
    )
    return attention + shares


def _table(result: Decomposition | DecompositionSet) -> str:
    means = head_means(result)
    columns = measures(means)
    titles = "".join(
        f'<th title="{escape(measure(c).meaning, quote=True)}">{escape(measure(c).title)}</th>' for c in columns
    )
    rows = "".join(_table_row(row, columns) for _, row in means.iterrows())
    n = n_averaged(result)
    mean = f" Means over {n} prompts or positions." if n > 1 else ""
    return section(
        "Table",
        f'<div class="ml-scroll"><table class="ml-sortable"><thead><tr><th>head</th>{titles}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        f"Click a column to sort; norms are Euclidean, in units of z.{mean}",
    )


def _table_row(row: pd.Series[Any], columns: list[str]) -> str:
    order = int(row["layer"]) * 100_000 + int(row["head"])
    cells = "".join(f'<td data-order="{float(row[c])!r}">{number(float(row[c]))}</td>' for c in columns)
    return f'<tr><td data-order="{order}">{escape(str(row["name"]))}</td>{cells}</tr>'


def _provenance(item: Decomposition) -> str:
    return section("Made with", facts({escape(k): escape(str(v)) for k, v in item.provenance.items()}))
