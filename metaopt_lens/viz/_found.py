"""The head of a page: what the model says, and which tokens and heads make it say it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._plots import draws
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Answer, Decomposition, LogitContributions, read_words, written
from metaopt_lens.interventions import head_effects
from metaopt_lens.runs import LabelPrediction
from metaopt_lens.viz._render import render
from metaopt_lens.viz._segments import segments, visible_token

N_STRONGEST = 12  # heads with an exact knock-out and a row in the table
_WORDS = 6
_MOST_HEADS_WITH_WORDS = 400
_TEXT = 0.6  # the most opaque colour behind text
_BLUE, _ORANGE = "29, 95, 191", "194, 65, 12"


@dataclass(frozen=True)
class Measured:
    """What knock-outs change of the answer's logit, before it is drawn.

    Attributes:
        first_order: of every head's meta-gradient, estimated. exact: of the strongest, by name.
        without_demo: the answer's logit without each demonstration. in_context: with all of them.
    """

    first_order: Float[Tensor, "layer head"]
    exact: dict[str, float]
    without_demo: list[float]
    in_context: float


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
        measure: whether to run knock-outs.
    """
    if item.source is None or item.runs.icl.stream is None:
        return None
    own = _own_answer(item) if answer is None and item.prompt.label is None else answer
    found = item.logits(own, versus=() if own is not answer and versus is None else versus)
    found = _first_step(found)
    strongest = _strongest(found)
    measured = _measure(item, found, strongest) if measure else None
    order = strongest if measured is None else _by_effect(strongest, found, measured)
    bound = max(float(found.zero_shot.abs().max()), float(found.meta_gradient.abs().max()), 1e-9)
    words = _words(item, found)
    return {
        "answer": visible_token(found.answer[0]),
        "versus": [visible_token(token) for token in found.versus[0]],
        "n_steps": len(found.answer),
        "logit": float(found.logit),
        "softcap": found.softcap,
        "tops": _tops(prediction),
        "sums": _sums(found),
        "segments": _rows(item, found, measured),
        "maps": [
            ("zero-shot part", "read from the query and what stands before", _grid(found.zero_shot, bound)),
            ("meta-gradient part", "read from the demonstrations", _grid(found.meta_gradient, bound)),
        ],
        "row_height": max(11, min(30, 430 // found.zero_shot.shape[0])),
        "heads": [_strong(ref, found, measured, words) for ref in order],
        "measured": measured is not None,
        "data": json.dumps(_data(item, found, measured, words), separators=(",", ":"), allow_nan=False),
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


def _first_step(found: LogitContributions) -> LogitContributions:
    """The first token of an answer of several."""
    if len(found.answer) == 1:
        return found
    first = {name: value[0] for name, value in vars(found).items() if isinstance(value, Tensor)}
    return replace(found, **first)  # type: ignore[arg-type]


def _strongest(found: LogitContributions) -> list[HeadRef]:
    sizes = torch.maximum(found.zero_shot.abs(), found.meta_gradient.abs())
    n_heads = sizes.shape[1]
    order = sizes.detach().flatten().argsort(descending=True)[:N_STRONGEST].tolist()
    return [HeadRef(index // n_heads, index % n_heads) for index in order]


def _by_effect(refs: list[HeadRef], found: LogitContributions, measured: Measured) -> list[HeadRef]:
    """By what was measured: the larger of a head's direct contribution and its knock-out's effect."""

    def size(ref: HeadRef) -> float:
        return max(abs(float(found.head_total[ref.layer, ref.head])), abs(measured.exact.get(str(ref), 0.0)))

    return sorted(refs, key=size, reverse=True)


def _measure(item: Decomposition, found: LogitContributions, heads: list[HeadRef]) -> Measured | None:
    """Knock-outs on the model as it is now; None under momentum attention, of which they know nothing."""
    if item.eta is not None or item.positions[-1] != item.tokenized.n_tokens - 1:
        return None
    model = item.required_source("effects")
    token, rivals = found.token_ids[0]

    def difference(logits: Tensor) -> Tensor:
        return logits[token] - logits[list(rivals)].mean() if rivals else logits[token]

    bos = item.tokenized.bos is not None
    every = head_effects(model, item.prompt, metric=difference, exact=False, prepend_bos=bos, progress=False)
    effects = head_effects(model, item.prompt, metric=difference, heads=heads, prepend_bos=bos, progress=False)
    exact = effects.exact[0]
    in_context = float(effects.in_context[0])
    return Measured(
        first_order=every.first_order[0],
        exact={str(ref): float(exact[ref.layer, ref.head]) for ref in heads},
        without_demo=[in_context - float(value) for value in effects.demo_exact[0]],
        in_context=in_context,
    )


def _words(item: Decomposition, found: LogitContributions) -> dict[str, dict[str, list[list[str]]]]:
    """Words of both parts of every head (of the strongest, where there are very many)."""
    model = item.required_source("words")
    n_layers, n_heads = found.zero_shot.shape
    refs = [HeadRef(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    if len(refs) > _MOST_HEADS_WITH_WORDS:
        refs = _strongest(found)
    last = item.at_last_position()
    parts = {"zero_shot": last.softmax.zero_shot, "meta_gradient": last.softmax.meta_gradient}
    words: dict[str, dict[str, list[list[str]]]] = {}
    for ref in refs:
        vectors = torch.stack(
            [
                written(model, last.runs.icl, ref.layer, [ref.head], z[ref.layer, ref.head][None].detach())
                for z in parts.values()
            ]
        )
        read = read_words(model, vectors, list(parts), layer=ref.layer, scale=found.scale.detach(), top=_WORDS)
        words[str(ref)] = {
            said.name: [[visible_token(word.token) for word in side] for side in (said.promoted, said.suppressed)]
            for said in read
        }
    return words


def _tops(prediction: LabelPrediction | None) -> list[dict[str, Any]]:
    if prediction is None:
        return []
    settings = (
        ("with the demonstrations", prediction.in_context_vocabulary),
        ("without them", prediction.zero_shot_vocabulary),
    )
    return [
        {"name": name, "tokens": [(visible_token(top.text), top.probability) for top in own.top]}
        for name, own in settings
    ]


def _sums(found: LogitContributions) -> list[dict[str, Any]]:
    values = {
        "heads reading the query": found.zero_shot.sum(),
        "heads reading the demonstrations": found.meta_gradient.sum(),
        **({} if found.momentum is None else {"momentum attention": found.momentum.sum()}),
        "MLPs": found.mlp.sum(),
        "embedding": found.embedding,
        "biases": found.attention_bias.sum() + found.bias,
    }
    numbers = {name: float(value) for name, value in values.items()}
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


def _rows(item: Decomposition, found: LogitContributions, measured: Measured | None) -> list[dict[str, Any]]:
    values = found.per_token.detach().sum((0, 1)).tolist()
    bound = max(max(map(abs, values)), 1e-9)
    rows = []
    demo = 0
    for segment in segments(item.tokenized):
        span = range(segment.span.start, segment.span.stop)
        number = None
        if segment.kind == "demo":
            number, demo = demo, demo + 1
        rows.append(
            {
                "name": segment.name,
                "kind": segment.kind,
                "colour": segment.colour,
                "demo": number if measured is not None else None,
                "tokens": [
                    (i, visible_token(item.tokenized.tokens[i]), colour(values[i], bound, _TEXT), values[i])
                    for i in span
                ],
                "total": sum(values[i] for i in span),
            }
        )
    return rows


def _grid(values: Float[Tensor, "layer head"], bound: float) -> list[list[tuple[str, float, str]]]:
    return [
        [(str(HeadRef(layer, head)), value, colour(value, bound)) for head, value in enumerate(row)]
        for layer, row in enumerate(values.detach().tolist())
    ]


def _strong(
    ref: HeadRef, found: LogitContributions, measured: Measured | None, words: dict[str, dict[str, list[list[str]]]]
) -> dict[str, Any]:
    zero_shot, meta_gradient = (float(t[ref.layer, ref.head]) for t in (found.zero_shot, found.meta_gradient))
    leading = "zero_shot" if abs(zero_shot) >= abs(meta_gradient) else "meta_gradient"
    return {
        "name": str(ref),
        "zero_shot": zero_shot,
        "meta_gradient": meta_gradient,
        "effect": None if measured is None else measured.exact[str(ref)],
        "leading": leading.replace("_", "-"),
        "words": words[str(ref)][leading][0] if str(ref) in words else [],
    }


def _data(
    item: Decomposition,
    found: LogitContributions,
    measured: Measured | None,
    words: dict[str, dict[str, list[list[str]]]],
) -> dict[str, Any]:
    """What the page's script needs to answer a click."""
    pattern = item.at_last_position().pattern.detach()
    n_layers, n_heads = found.zero_shot.shape
    heads = {}
    for layer in range(n_layers):
        for head in range(n_heads):
            name = str(HeadRef(layer, head))
            about: dict[str, Any] = {
                "zs": _short(found.zero_shot[layer, head]),
                "mg": _short(found.meta_gradient[layer, head]),
                "tokens": [_short(v) for v in found.per_token[layer, head].tolist()],
                "attention": [_short(v) for v in pattern[layer, head].tolist()],
            }
            if name in words:
                about["words"] = words[name]
            if measured is not None:
                about["first"] = _short(measured.first_order[layer, head])
                if name in measured.exact:
                    about["exact"] = _short(measured.exact[name])
            heads[name] = about
    return {
        "demos": [item.demonstrations.start, item.demonstrations.stop],
        "all": [_short(v) for v in found.per_token.detach().sum((0, 1)).tolist()],
        "heads": heads,
        "without": [] if measured is None else [_short(v) for v in measured.without_demo],
        "logit": _short(found.logit) if measured is None else _short(measured.in_context),
    }


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.4g}")
