"""Choose a learning rate on held-out demonstrations."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from metaopt_lens._errors import NonFiniteError, OptionError, PromptError
from metaopt_lens.finetuning._descent import Descent
from metaopt_lens.finetuning._finetune import prepare
from metaopt_lens.models import Hook, LensModel, wrap
from metaopt_lens.prompts import Demo, ICLPrompt, Template, tokenize_label
from metaopt_lens.runs import check_candidates, run_shared_prefix, score_candidates, tokenize_all

if TYPE_CHECKING:
    import pandas as pd

_COARSE = 3  # of a refined search: every third rate first
# The published search: {1 ... 9} x {.1, .01, .001, .0001}, thinned to steps of about 2.
DEFAULT_GRID = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class LearningRateChoice:
    """The learning rate that did best on held-out demonstrations, and how all of them did.

    Attributes:
        lr: the choice.
        rates: what was tried.
        accuracy, loss: on the held-out demonstrations, NaN where training diverged.
        base_accuracy, base_loss: without finetuning.
    """

    lr: float
    metric: str
    rates: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    base_accuracy: float
    base_loss: float

    def to_frame(self) -> pd.DataFrame:
        """One row per learning rate."""
        import pandas as pd

        return pd.DataFrame({"lr": self.rates, "accuracy": self.accuracy, "loss": self.loss})


def choose_learning_rate(
    model: Any,
    demos: ICLPrompt | Sequence[Demo | tuple[str, str]],
    held_out: Sequence[Demo | tuple[str, str]],
    *,
    rates: Sequence[float] = DEFAULT_GRID,
    search: Literal["all", "refined"] = "all",
    metric: Literal["accuracy", "loss"] = "accuracy",
    candidates: Sequence[str] | None = None,
    template: Template | None = None,
    prepend_bos: bool | None = None,
    **settings: Any,
) -> LearningRateChoice:
    """Finetune with every rate and keep the one that predicts held-out demonstrations best, zero-shot.

    Ties in accuracy go to the lower loss (mean negative log-probability of the correct label among the candidates).
    A rate has diverged, and is given up, once a training loss is above twice that of the first step and twice that of
    guessing, ln(vocabulary).

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        demos: what to finetune on.
        held_out: what to judge on; none of `demos`.
        rates: learning rates to try.
        search: try ``"all"`` rates, or ``"refined"``: in increasing order every third one, then the neighbours of the
            best until both have been tried. About half the work; of a curve with several peaks it finds one.
        metric: ``"accuracy"`` on the held-out demonstrations (ties go to the lower loss), or ``"loss"``.
        candidates: the label words; by default all labels that occur.
        template: the text around input and label; the prompt's own for an `ICLPrompt`, whose instruction stands before
            the held-out queries too.
        prepend_bos: train and judge with BOS first; None for the model's default.
        settings: further arguments of `finetune`.

    Raises:
        OptionError: no rates, a rate that is not positive, or an unknown `search` or `metric`.
        PromptError: held-out labels that are not among the candidates, or candidates that cannot be told apart.
        NonFiniteError: every rate diverged.
    """
    if not rates:
        raise OptionError("choose_learning_rate needs at least one rate.")
    if metric not in {"accuracy", "loss"}:
        raise OptionError(f"metric must be 'accuracy' or 'loss', got {metric!r}.")
    if search not in {"all", "refined"}:
        raise OptionError(f"search must be 'all' or 'refined', got {search!r}.")
    settings.pop("keep_factors", None)
    if isinstance(demos, ICLPrompt):
        form, instruction, train = demos.template, demos.instruction, [_pair(demo) for demo in demos.demos]
    else:
        form, instruction, train = template or Template(), None, [_pair(demo) for demo in demos]
    judge = _Judge.of(
        wrap(model), train, held_out, candidates, template=form, instruction=instruction, prepend_bos=prepend_bos
    )
    training = demos if isinstance(demos, ICLPrompt) else train
    descent = prepare(judge.model, training, lr=rates[0], template=form, prepend_bos=prepend_bos, **settings)
    checked = [replace(descent.settings, lr=float(rate)).lr for rate in rates]
    base = judge.verdict()
    found: dict[int, tuple[float, float]] = {}

    def best() -> int | None:
        usable = [i for i, (_, loss) in found.items() if not math.isnan(loss)]
        return min(usable, key=lambda i: (-found[i][0] if metric == "accuracy" else 0.0, found[i][1]), default=None)

    order = sorted(range(len(rates)), key=lambda i: checked[i])
    todo = order if search == "all" else order[1::_COARSE] or order
    while todo:
        found |= {i: _try_rate(descent, judge, checked[i]) for i in todo}
        todo = [] if search == "all" else _untried_neighbours(order, best(), found)
    chosen = best()
    if chosen is None:
        raise NonFiniteError(f"finetuning diverged at every learning rate tried ({list(rates)}): try smaller ones.")
    tried = sorted(found)
    return LearningRateChoice(
        lr=float(rates[chosen]),
        metric=metric,
        rates=tuple(rates[i] for i in tried),
        accuracy=tuple(found[i][0] for i in tried),
        loss=tuple(found[i][1] for i in tried),
        base_accuracy=base[0],
        base_loss=base[1],
    )


def _untried_neighbours(order: Sequence[int], best: int | None, tried: Collection[int]) -> list[int]:
    """Next to the best rate; below the smallest one tried, where all have diverged."""
    places = (
        [min(order.index(i) for i in tried) - 1] if best is None else [order.index(best) + step for step in (-1, 1)]
    )
    return [order[place] for place in places if 0 <= place < len(order) and order[place] not in tried]


def _try_rate(descent: Descent, judge: _Judge, rate: float) -> tuple[float, float]:
    """Accuracy and loss on the held-out demonstrations after finetuning at a rate; NaN if it diverges."""
    try:
        update = descent.at(rate)
    except NonFiniteError:
        return math.nan, math.nan
    return judge.verdict(update.hooks(judge.model))


def _pair(demo: Demo | tuple[str, str]) -> tuple[str, str]:
    return (demo.input, demo.label) if isinstance(demo, Demo) else demo


@dataclass(frozen=True, eq=False)
class _Judge:
    """Held-out demonstrations, tokenised once: what they ask, the label words, and which of them is right."""

    model: LensModel
    shared: tuple[int, ...]  # the instruction, with BOS: run once for all queries
    queries: tuple[tuple[int, ...], ...]
    words: tuple[tuple[int, ...], ...]
    gold: Int[Tensor, " query"]

    @classmethod
    def of(
        cls,
        model: LensModel,
        train: Sequence[tuple[str, str]],
        held_out: Sequence[Demo | tuple[str, str]],
        candidates: Sequence[str] | None,
        *,
        template: Template,
        instruction: str | None,
        prepend_bos: bool | None,
    ) -> _Judge:
        """Judged on the same prompt as trained on: its template, its instruction, and BOS or not."""
        test = [_pair(demo) for demo in held_out]
        if not test:
            raise PromptError("choose_learning_rate needs at least one held-out demonstration.")
        words = tuple(candidates or dict.fromkeys(label for _, label in (*train, *test)))
        ids = [tokenize_label(word, template, model.tokenizer) for word in words]
        check_candidates(ids, words)
        missing = sorted({label for _, label in test} - set(words))
        if missing:
            raise PromptError(f"the held-out label {missing[0]!r} is not among the candidates {list(words)}.")
        prompts = [ICLPrompt((), text, template, instruction) for text, _ in test]
        tokenized = tokenize_all(model, prompts, prepend_bos=prepend_bos)
        start = 0 if instruction is None else tokenized[0].query.start
        return cls(
            model,
            shared=tokenized[0].ids[:start],
            queries=tuple(tokens.ids[start:] for tokens in tokenized),
            words=tuple(map(tuple, ids)),
            gold=torch.tensor([words.index(label) for _, label in test]),
        )

    def verdict(self, hooks: Sequence[Hook] = ()) -> tuple[float, float]:
        """Accuracy, and mean negative log-probability of the right label among the candidates."""
        with self.model.hooked(hooks):
            prefix = run_shared_prefix(self.model, self.shared)
            scores = score_candidates(self.model, prefix, self.queries, self.words)
        hits = (scores.argmax(-1) == self.gold).double().mean()
        log_probs = scores.log_softmax(-1)[torch.arange(len(self.gold)), self.gold]
        return float(hits), float(-log_probs.mean())
