"""The head of a page: what the model says, and which tokens and heads make it say it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._plots import draws
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Answer, Decomposition
from metaopt_lens.runs import LabelPrediction
from metaopt_lens.viz._found_views import View, Views, chunk_noun, make_views, sums, view_name, views_data
from metaopt_lens.viz._render import render
from metaopt_lens.viz._segments import segments, visible_token

_MANY_DEMOS, _SHORT_DEMO = 6, 40  # demonstrations, and characters in one
_TEXT = 0.6  # the most opaque colour behind text
_BLUE, _ORANGE = "29, 95, 191", "194, 65, 12"


def found_context(
    item: Decomposition,
    prediction: LabelPrediction | None,
    answer: Answer | None = None,
    versus: Answer | Sequence[Answer] | None = None,
    *,
    measure: bool = True,
) -> dict[str, Any] | None:
    """What ``found.html.j2`` shows of one prompt; None for a result without its model.

    Args:
        item: a decomposition.
        prediction: what the model answers.
        answer: see `Decomposition.logits`; None for the prompt's label or, without one, the model's own first choice.
        versus: the rivals.
        measure: whether to run knock-outs, and the model at other tokens of the query.
    """
    if item.source is None or item.runs.icl.stream is None:
        return None
    own = _own_answer(item) if answer is None and item.prompt.label is None else answer
    views = make_views(item, own, () if own is not answer and versus is None else versus, measure=measure)
    view = views.views[views.default]
    said = view.said
    bound = max(float(said.zero_shot.abs().max()), float(said.meta_gradient.abs().max()), 1e-9)
    noun = chunk_noun(item)
    return {
        "noun": noun,
        "answer": visible_token(said.answer[0]),
        "versus": [visible_token(token) for token in said.versus[0]],
        "logit": float(said.logit),
        "softcap": said.softcap,
        "tops": _tops(prediction, noun),
        "sums": _sums(view, noun),
        "views": [(index, view_name(one, views.tokens)) for index, one in enumerate(views.views)],
        "default": views.default,
        "segments": _rows(item, views),
        "rows": _layout(item),
        "maps": [
            ("zero-shot part", "read from the query and what stands before", _grid(said.zero_shot, bound)),
            ("meta-gradient part", f"read from the {noun}s", _grid(said.meta_gradient, bound)),
        ],
        "row_height": max(11, min(30, 430 // said.zero_shot.shape[0])),
        "heads": [_strong(ref, view) for ref in view.heads],
        "measured": view.measured is not None,
        "note": views.note,
        "data": json.dumps(views_data(views, item), separators=(",", ":"), allow_nan=False, ensure_ascii=False),
    }


@draws(Decomposition, "compact")
def compact_view(item: Decomposition) -> str:
    """What a notebook shows of a decomposition by itself: what was found, without knock-outs.

    Args:
        item: a decomposition with its model.

    Returns:
        Markup with its style sheet and script.
    """
    found = found_context(item, None, measure=False)
    return render("compact.html.j2", found=found, text=repr(item))


def colour(value: float, bound: float, most: float = 1.0) -> str:
    """Blue for positive, orange for negative, white for 0.

    Args:
        value: what is drawn.
        bound: the size that has the full colour.
        most: how opaque that is.
    """
    strength = most * min(abs(value) / bound, 1.0)
    return f"rgba({_BLUE if value >= 0 else _ORANGE}, {strength:.3f})"


def _own_answer(item: Decomposition) -> int:
    """The model's own first choice."""
    model, stream = item.required_source("answers"), item.runs.icl.stream
    assert stream is not None
    return int(model.head.logits(stream.end[-1].detach()).argmax())


def _tops(prediction: LabelPrediction | None, noun: str) -> list[dict[str, Any]]:
    if prediction is None:
        return []
    settings = (
        (f"with the {noun}s", prediction.in_context_vocabulary),
        ("without them", prediction.zero_shot_vocabulary),
    )
    return [
        {"name": name, "tokens": [(visible_token(top.text), top.probability) for top in own.top]}
        for name, own in settings
    ]


def _sums(view: View, noun: str) -> list[dict[str, Any]]:
    numbers = sums(view.said, noun)
    widest = max(max(map(abs, numbers.values())), 1e-9)
    return [
        {
            "name": name,
            "value": value,
            "width": 50 * abs(value) / widest,
            "left": 50 if value >= 0 else 50 - 50 * abs(value) / widest,
        }
        for name, value in numbers.items()
    ]


def _rows(item: Decomposition, views: Views) -> list[dict[str, Any]]:
    """The prompt's tokens row by row, and last the answer's own, if they are fed."""
    view, n_prompt = views.views[views.default], item.tokenized.n_tokens
    values = view.said.per_token.detach().sum((0, 1)).tolist()
    bound = max(max(map(abs, values)), 1e-9)
    parts: list[tuple[str, str, str, int, int]] = [
        (s.name, s.kind, s.colour, s.span.start, s.span.stop) for s in segments(item.tokenized)
    ]
    if len(views.tokens) > n_prompt:
        parts.append(("answer", "answer", "#1f2933", n_prompt, len(views.tokens)))
    rows = []
    demo = 0
    for name, kind, band, start, stop in parts:
        number = None
        if kind == "demo":
            number, demo = demo, demo + 1
            name = name if chunk_noun(item) == "demonstration" else f"chunk {demo}"
        rows.append(
            {
                "name": name,
                "kind": kind,
                "colour": band,
                "demo": number if view.measured is not None else None,
                "tokens": [
                    (i, visible_token(views.tokens[i]), colour(values[i], bound, _TEXT), values[i])
                    for i in range(start, stop)
                ],
                "total": sum(values[start:stop]),
            }
        )
    return rows


def _layout(item: Decomposition) -> str:
    """Short rows are not drawn over the whole width: a few are narrow, many stand side by side."""
    longest = max(len("".join(item.tokenized.tokens[demo.slice])) for demo in item.tokenized.demos)
    if longest >= _SHORT_DEMO:
        return ""
    return "ml-many" if len(item.tokenized.demos) > _MANY_DEMOS else "ml-short"


def _grid(values: Float[Tensor, "layer head"], bound: float) -> list[list[tuple[str, float, str]]]:
    return [
        [(str(HeadRef(layer, head)), value, colour(value, bound)) for head, value in enumerate(row)]
        for layer, row in enumerate(values.detach().tolist())
    ]


def _strong(ref: HeadRef, view: View) -> dict[str, Any]:
    name = str(ref)
    zero_shot, meta_gradient = (float(t[ref.layer, ref.head]) for t in (view.said.zero_shot, view.said.meta_gradient))
    leading = "zero_shot" if abs(zero_shot) >= abs(meta_gradient) else "meta_gradient"
    return {
        "name": name,
        "zero_shot": zero_shot,
        "meta_gradient": meta_gradient,
        "effect": None if view.measured is None else view.measured.exact[name],
        "words": view.words[name][leading][0] if name in view.words else [],
    }
