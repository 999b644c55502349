"""Choose a learning rate on held-out demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from metaopt_lens._errors import NonFiniteError, OptionError, PromptError
from metaopt_lens.finetuning._finetune import finetune
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.prompts import Demo, ICLPrompt, Template, tokenize_label
from metaopt_lens.runs import check_candidates, score_candidates, tokenize_for

if TYPE_CHECKING:
    import pandas as pd

# The published search: {1 ... 9} x {.1, .01, .001, .0001}, thinned to steps of about 2.
DEFAULT_GRID = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class LearningRateChoice:
    """The learning rate that did best on held-out demonstrations, and how all of them did.

    Attributes:
        lr: the choice. rates: what was tried; accuracy, loss: on the held-out demonstrations, NaN where the training
            loss diverged. base_accuracy, base_loss: without finetuning.
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
    metric: Literal["accuracy", "loss"] = "accuracy",
    candidates: Sequence[str] | None = None,
    template: Template | None = None,
    prepend_bos: bool | None = None,
    **settings: Any,
) -> LearningRateChoice:
    """Finetune with every rate and keep the one that predicts held-out demonstrations best, zero-shot.

    Ties in accuracy go to the lower loss (mean negative log-probability of the correct label among the candidates).

    Args:
        demos: what to finetune on; held_out: what to judge on (not among `demos`).
        candidates: the label words; by default all labels that occur.
        template: the text around input and label; the prompt's own for an `ICLPrompt`, whose instruction stands before
            the held-out queries too.
        prepend_bos: train and judge with BOS first; None for the model's default.
        settings: further arguments of `finetune`.

    Raises:
        OptionError: no rates, or a rate that is not positive.
        PromptError: held-out labels that are not among the candidates, or candidates that cannot be told apart.
        NonFiniteError: every rate diverged.
    """
    if not rates:
        raise OptionError("choose_learning_rate needs at least one rate.")
    if metric not in {"accuracy", "loss"}:
        raise OptionError(f"metric must be 'accuracy' or 'loss', got {metric!r}.")
    wrapped = wrap(model)
    form = demos.template if isinstance(demos, ICLPrompt) else template or Template()
    instruction = demos.instruction if isinstance(demos, ICLPrompt) else None
    train = [_pair(d) for d in (demos.demos if isinstance(demos, ICLPrompt) else demos)]
    test = [_pair(d) for d in held_out]
    if not test:
        raise PromptError("choose_learning_rate needs at least one held-out demonstration.")
    words = tuple(candidates or dict.fromkeys(label for _, label in (*train, *test)))
    ids = [tokenize_label(word, form, wrapped.tokenizer) for word in words]
    check_candidates(ids, words)
    missing = sorted({label for _, label in test} - set(words))
    if missing:
        raise PromptError(f"the held-out label {missing[0]!r} is not among the candidates {list(words)}.")
    gold = torch.tensor([words.index(label) for _, label in test])
    # Trained and judged on the same prompt: its template, its instruction, and BOS or not.
    prompts = [ICLPrompt((), text, form, instruction) for text, _ in test]
    queries = [tokenize_for(wrapped, prompt, prepend_bos=prepend_bos).ids for prompt in prompts]
    training = demos if isinstance(demos, ICLPrompt) else train
    base_accuracy, base_loss = _judge(wrapped, queries, ids, gold)
    accuracy, loss = [], []
    for rate in rates:
        try:
            update = finetune(
                wrapped, training, lr=rate, template=form, prepend_bos=prepend_bos, progress=False, **settings
            )
        except NonFiniteError:
            found = (float("nan"), float("nan"))
        else:
            with update.applied(wrapped):
                found = _judge(wrapped, queries, ids, gold)
        accuracy.append(found[0])
        loss.append(found[1])
    usable = [i for i in range(len(rates)) if loss[i] == loss[i]]
    if not usable:
        raise NonFiniteError(f"finetuning diverged at every learning rate tried ({list(rates)}): try smaller ones.")
    keys = {i: (-accuracy[i], loss[i]) if metric == "accuracy" else (loss[i],) for i in usable}
    best = min(usable, key=lambda i: keys[i])
    return LearningRateChoice(
        lr=float(rates[best]),
        metric=metric,
        rates=tuple(rates),
        accuracy=tuple(accuracy),
        loss=tuple(loss),
        base_accuracy=base_accuracy,
        base_loss=base_loss,
    )


def _pair(demo: Demo | tuple[str, str]) -> tuple[str, str]:
    return (demo.input, demo.label) if isinstance(demo, Demo) else demo


def _judge(
    model: LensModel,
    queries: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    gold: torch.Tensor,
) -> tuple[float, float]:
    scores = score_candidates(model, None, queries, candidates)
    hits = (scores.argmax(-1) == gold).double().mean()
    log_probs = scores.log_softmax(-1)[torch.arange(len(gold)), gold]
    return float(hits), float(-log_probs.mean())
