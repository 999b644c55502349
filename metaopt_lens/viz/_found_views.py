"""What a page's script needs: the answer's logit taken apart at every token where it can be read."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import ModelMismatchError
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import (
    Answer,
    Decomposition,
    LogitContributions,
    at_one_destination,
    read_along,
    read_words,
    written,
)
from metaopt_lens.dual import SoftmaxParts
from metaopt_lens.interventions import DemoTokens, LogitRead, logit_effects
from metaopt_lens.prompts import read_token
from metaopt_lens.runs import Run, softmax_parts
from metaopt_lens.viz._segments import visible_token

N_STRONGEST = 12  # heads with an exact knock-out and a row in the table
_WORDS = 6
_MOST_HEADS_WITH_WORDS = 400
_MOST_POSITIONS = 8  # of the query
_MOST_BYTES = 2_500_000  # that the page may spend on numbers per token and head
_MOST_DEMOS_IN_ALL_SELECTIONS = 5  # 31 runs; with more demonstrations each alone and all together
_HALF_MAX = 1024.0  # largest size in half precision: small ones then keep their digits, too


@dataclass(frozen=True, eq=False)
class Measured:
    """What knock-outs change of the answer's logit at one token.

    Attributes:
        in_context: the logit (after a soft-cap) with all demonstrations.
        first_order: of every head's meta-gradient, estimated.
        exact: of the strongest, by name.
        without: the logit without demonstrations, by their numbers ("0,2").
    """

    in_context: float
    first_order: Float[Tensor, "layer head"]
    exact: dict[str, float]
    without: dict[str, float]


@dataclass(frozen=True, eq=False)
class View:
    """One token where the answer's logit is read.

    Attributes:
        at: its position among `tokens`.
        step: which token of the answer is predicted there (0 at tokens of the query before its last).
        said: contributions to that logit.
        measured: knock-outs; None where they were not made.
        words: of heads by name and part: what they promote, and what they suppress.
        top: the model's own first choice there, and its probability.
        masses: attention of every head on each demonstration.
        rest: on everything else, the sink included.
        attention: on every token.
    """

    at: int
    step: int
    said: LogitContributions
    measured: Measured | None
    words: dict[str, dict[str, list[list[str]]]]
    top: tuple[str, float]
    masses: Float[Tensor, "layer head demo"]
    rest: Float[Tensor, "layer head"]
    attention: Float[Tensor, "layer head src"]

    @property
    def heads(self) -> list[HeadRef]:
        """The strongest, by what was measured: the larger of direct contribution and knock-out."""
        exact = {} if self.measured is None else self.measured.exact

        def size(ref: HeadRef) -> float:
            return max(abs(float(self.said.head_total[ref.layer, ref.head])), abs(exact.get(str(ref), 0.0)))

        found = strongest(self.said)
        return sorted(found, key=size, reverse=True) if exact else found


@dataclass(frozen=True, eq=False)
class Views:
    """All of a page's views.

    Attributes:
        tokens: of the prompt and of the answer's tokens that are fed.
        views: tokens of the query first, then the answer's further ones.
        default: index of the view at the prompt's end.
        note: why there are no knock-outs though there is a model; None otherwise.
    """

    tokens: tuple[str, ...]
    views: tuple[View, ...]
    default: int
    note: str | None = None


def make_views(
    item: Decomposition, answer: Answer | None, versus: Answer | Sequence[Answer] | None, *, measure: bool
) -> Views:
    """Contributions, words and knock-outs wherever the answer is read.

    Args:
        item: a decomposition with its model.
        answer: see `Decomposition.logits`.
        versus: the rivals.
        measure: whether to run knock-outs, and the model at other tokens of the query.
    """
    last, note = item.at_last_position(), None
    if measure and item.eta is None and item.positions[-1] == item.tokenized.n_tokens - 1:
        try:
            return _everywhere(last, answer, versus)
        except ModelMismatchError as error:
            note = f"No knock-outs: {error}"
    said = item.logits(answer, versus=versus)
    run = last.runs.icl
    only = _at(said, 0) if len(said.answer) > 1 else said
    only = replace(only, per_token=only.per_token[..., : run.tokens.n_tokens])
    return Views(run.tokens.tokens, (_view(last, run, softmax_parts(run), 0, 0, only, None, all_words=True),), 0, note)


def _everywhere(item: Decomposition, answer: Answer | None, versus: Answer | Sequence[Answer] | None) -> Views:
    model, tokens = item.required_source("logits"), item.tokenized
    n_heads, n_sources = model.info.n_layers * model.info.n_heads, tokens.n_tokens
    affordable = _MOST_BYTES // (n_heads * n_sources * 2 * 2 * 4 // 3)  # two numbers, two bytes, base64
    n_before = max(0, min(len(tokens.query) - 1, _MOST_POSITIONS - 1, affordable - 1))
    run, said = read_along(model, item.prompt, item.runs.icl, answer, versus, n_before=n_before)
    steps = [_at(said, step) if len(said.answer) > 1 else said for step in range(len(said.answer))]
    measured = _measure(item, run, steps)
    parts = softmax_parts(run)
    views = [
        _view(item, run, parts, index, max(0, index - n_before), step, found, all_words=index == n_before)
        for index, (step, found) in enumerate(zip(steps, measured, strict=True))
    ]
    return Views(run.tokens.tokens, tuple(views), n_before)


def _at(said: LogitContributions, step: int) -> LogitContributions:
    """One step of several, without their axis."""
    values = {name: value[step] for name, value in vars(said).items() if isinstance(value, Tensor)}
    names = {name: (getattr(said, name)[step],) for name in ("answer", "versus", "token_ids")}
    return replace(said, **values, **names)  # type: ignore[arg-type]


def strongest(said: LogitContributions) -> list[HeadRef]:
    """Heads by the larger of their two parts' contributions.

    Args:
        said: at one step.
    """
    sizes = torch.maximum(said.zero_shot.abs(), said.meta_gradient.abs())
    n_heads = sizes.shape[1]
    order = sizes.detach().flatten().argsort(descending=True)[:N_STRONGEST].tolist()
    return [HeadRef(index // n_heads, index % n_heads) for index in order]


def selections(n_demos: int) -> list[tuple[int, ...]]:
    """Which demonstrations are switched off together in a run of their own: all selections of a few, else each and all.

    Args:
        n_demos: how many there are.
    """
    sizes = range(1, n_demos + 1) if n_demos <= _MOST_DEMOS_IN_ALL_SELECTIONS else (1, n_demos)
    return [chosen for size in sizes for chosen in combinations(range(n_demos), size)]


def _measure(item: Decomposition, run: Run, steps: Sequence[LogitContributions]) -> list[Measured]:
    """Knock-outs on the model as it is now."""
    demos = DemoTokens.of(run.tokens)
    reads = [
        LogitRead(run.tokens.ids[demos.stop : at + 1], *said.token_ids[0])
        for at, said in zip(run.destinations, steps, strict=True)
    ]
    heads = [strongest(said) for said in steps]
    without = selections(len(demos.spans))
    found = logit_effects(item.required_source("effects"), demos, reads, heads=heads, without=without)
    names = [",".join(map(str, chosen)) for chosen in without]
    return [
        Measured(
            in_context=float(found.in_context[index]),
            first_order=found.first_order[index],
            exact=dict(zip(map(str, heads[index]), found.heads[index].tolist(), strict=True)),
            without=dict(zip(names, found.without[index].tolist(), strict=True)),
        )
        for index in range(len(steps))
    ]


def _view(
    item: Decomposition,
    run: Run,
    parts: SoftmaxParts,
    index: int,
    step: int,
    said: LogitContributions,
    measured: Measured | None,
    *,
    all_words: bool,
) -> View:
    model, attention = item.required_source("words"), run.pattern[index].detach()
    assert run.stream is not None
    chances = model.head.logits(run.stream.end[index].detach()).detach().float().softmax(-1)
    first = int(chances.argmax())
    return View(
        at=run.destinations[index],
        step=step,
        said=said,
        measured=measured,
        words=_words(item, run, parts, index, said, everywhere=all_words),
        top=(visible_token(read_token(first, model.tokenizer)), float(chances[first])),
        masses=torch.stack([attention[..., demo.slice].float().sum(-1) for demo in run.tokens.demos], dim=-1),
        rest=parts.remaining[index].detach(),
        attention=attention,
    )


def _words(
    item: Decomposition, run: Run, parts: SoftmaxParts, index: int, said: LogitContributions, *, everywhere: bool
) -> dict[str, dict[str, list[list[str]]]]:
    """Words of both parts of every head (of the strongest, where there are very many)."""
    model, here = item.required_source("words"), at_one_destination(run, index)
    n_layers, n_heads = said.zero_shot.shape
    refs = [HeadRef(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    if not everywhere or len(refs) > _MOST_HEADS_WITH_WORDS:
        refs = strongest(said)
    of = {"zero_shot": parts.zero_shot[index], "meta_gradient": parts.meta_gradient[index]}
    words: dict[str, dict[str, list[list[str]]]] = {}
    for ref in refs:
        vectors = torch.stack(
            [written(model, here, ref.layer, [ref.head], z[ref.layer, ref.head][None].detach()) for z in of.values()]
        )
        read = read_words(model, vectors, list(of), layer=ref.layer, scale=said.scale.detach(), top=_WORDS)
        words[str(ref)] = {
            one.name: [[visible_token(word.token) for word in side] for side in (one.promoted, one.suppressed)]
            for one in read
        }
    return words


# ---- as JSON ---------------------------------------------------------------------------------------------------------


def views_data(views: Views, item: Decomposition) -> dict[str, Any]:
    """The views as the page's script reads them.

    Args:
        views: of one prompt.
        item: the prompt's decomposition.
    """
    n_layers, n_heads = views.views[0].said.zero_shot.shape
    return {
        "noun": chunk_noun(item),
        "n_heads": n_heads,
        "heads": [str(HeadRef(layer, head)) for layer in range(n_layers) for head in range(n_heads)],
        "demos": [[demo.start, demo.stop] for demo in item.tokenized.demos],
        "default": views.default,
        "views": [_view_data(view) for view in views.views],
    }


def chunk_noun(item: Decomposition) -> str:
    """What the page calls a demonstration: chunks of a context have no labels.

    Args:
        item: a decomposition.
    """
    return "demonstration" if any(demo.label for demo in item.prompt.demos) else "chunk"


def sums(said: LogitContributions, noun: str) -> dict[str, float]:
    """What the model's parts add, by name.

    Args:
        said: at one step.
        noun: what a demonstration is called.
    """
    values = {
        "heads reading the query": said.zero_shot.sum(),
        f"heads reading the {noun}s": said.meta_gradient.sum(),
        **({} if said.momentum is None else {"momentum attention": said.momentum.sum()}),
        "MLPs": said.mlp.sum(),
        "embedding": said.embedding,
        "biases": said.attention_bias.sum() + said.bias,
    }
    return {name: float(value) for name, value in values.items()}


def view_name(view: View, tokens: Sequence[str]) -> str:
    """How the chooser names a view.

    Args:
        view: one of them.
        tokens: of the prompt with the answer's.
    """
    what = f"{view.at} {visible_token(tokens[view.at])}"
    return what if view.step == 0 else f"{what} (answer token {view.step + 1})"


def _view_data(view: View) -> dict[str, Any]:
    said, measured = view.said, view.measured
    found: dict[str, Any] = {
        "at": view.at,
        "answer": visible_token(said.answer[0]),
        "versus": [visible_token(token) for token in said.versus[0]],
        "top": [view.top[0], short(view.top[1])],
        "logit": short(said.logit),
        "sums": [short(value) for value in sums(said, "").values()],
        "zs": _shorts(said.zero_shot),
        "mg": _shorts(said.meta_gradient),
        "masses": [_shorts(row) for row in view.masses.flatten(0, 1)],
        "rest": _shorts(view.rest),
        "tokens": _halves(said.per_token),
        "attention": _halves(view.attention),
        "strong": [str(ref) for ref in view.heads],
        "words": view.words,
    }
    if measured is not None:
        found |= {
            "run": short(measured.in_context),
            "first": _shorts(measured.first_order),
            "exact": {name: short(value) for name, value in measured.exact.items()},
            "without": {name: short(value) for name, value in measured.without.items()},
        }
    return found


def short(value: float | Tensor) -> float:
    """A number in four digits."""
    return float(f"{float(value):.4g}")


def _shorts(values: Tensor) -> list[float]:
    return [short(value) for value in values.detach().flatten().tolist()]


def _halves(values: Float[Tensor, "layer head src"]) -> dict[str, Any]:
    """Numbers in half precision, little-endian, and the unit they are in."""
    unit = max(float(values.detach().abs().max()), 1e-30) / _HALF_MAX
    halves = (values.detach().double() / unit).half().cpu().numpy().astype("<f2")
    return {"unit": unit, "data": base64.b64encode(halves.tobytes()).decode("ascii")}
