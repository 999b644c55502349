"""Demonstrations and plain texts as token sequences with the positions that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metaopt_lens._errors import ContextWindowError, PromptError
from metaopt_lens.finetuning._settings import Loss
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import Demo, ICLPrompt, Template, TokenizedPrompt
from metaopt_lens.runs import tokenize_for


@dataclass(frozen=True)
class TrainingExample:
    """One sequence to learn from: token ids, and the indices of the tokens whose prediction is learned."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


def training_examples(
    model: LensModel,
    demos: ICLPrompt | Sequence[Demo | tuple[str, str]],
    *,
    template: Template | None = None,
    loss: Loss = "all",
    prepend_bos: bool | None = None,
) -> list[TrainingExample]:
    """Every demonstration with exactly the ids it has in the prompt, behind BOS, without its separator.

    Args:
        model: a wrapped model.
        demos: demonstrations, or a prompt that has them.
        template: the text around input and label; a prompt brings its own.
        loss: ``"all"`` predicted tokens, or those of the ``"label"``.
        prepend_bos: put BOS first; None for the model's default.

    Raises:
        PromptError: no demonstrations, or one that leaves nothing to predict.
        ContextWindowError: a demonstration longer than the context window.
    """
    if isinstance(demos, ICLPrompt):
        prompt = demos
    else:
        pairs = [(d.input, d.label) if isinstance(d, Demo) else d for d in demos]
        if not pairs:
            raise PromptError("finetuning needs at least one demonstration.")
        # Any query will do: only the demonstrations' ids are taken.
        prompt = ICLPrompt(pairs, pairs[0][0], template or Template())
    tokenized = tokenize_for(model, prompt, prepend_bos=prepend_bos, require_demos=True, check_window=False)
    n_bos = 0 if tokenized.bos is None else len(tokenized.bos)
    examples = []
    if loss == "label" and not all(map(len, tokenized.labels)):
        raise PromptError("loss='label' learns labels, and the chunks of a context have none: use loss='all'.")
    for index, (ids, demo, label) in enumerate(
        zip(demonstration_ids(tokenized), tokenized.demos, tokenized.labels, strict=True)
    ):
        first = n_bos + label.start - demo.start if loss == "label" else 1
        targets = tuple(range(max(first, 1), len(ids)))
        if not targets:
            raise PromptError(f"demonstration {index} has a single token and no BOS: there is nothing to predict.")
        if len(ids) > model.info.n_ctx:
            raise ContextWindowError(
                f"demonstration {index} has {len(ids)} tokens, but the context window of {model.info.name} is "
                f"{model.info.n_ctx}."
            )
        examples.append(TrainingExample(ids, targets))
    return examples


def demonstration_ids(tokenized: TokenizedPrompt) -> tuple[tuple[int, ...], ...]:
    """Ids of every demonstration as it is trained on: behind BOS, where the prompt has it, without its separator.

    Args:
        tokenized: tokens of the prompt.
    """
    bos = () if tokenized.bos is None else tokenized.ids[tokenized.bos.slice]
    return tuple(
        bos + tokenized.ids[demo.start : label.stop]
        for demo, label in zip(tokenized.demos, tokenized.labels, strict=True)
    )


def text_examples(model: LensModel, texts: Sequence[str], *, prepend_bos: bool | None = None) -> list[TrainingExample]:
    """Plain texts, each behind BOS, all tokens learned; for control runs on unrelated text.

    Raises:
        PromptError: no texts, or one with nothing to predict.
        ContextWindowError: a text longer than the context window.
    """
    if not texts:
        raise PromptError("finetuning needs at least one text.")
    examples = []
    for index, text in enumerate(texts):
        prompt = ICLPrompt((), text, Template(input="{input}"))
        tokenized = tokenize_for(model, prompt, prepend_bos=prepend_bos, check_window=False)
        if tokenized.n_tokens < 2:
            raise PromptError(f"text {index} has a single token: there is nothing to predict.")
        model.check_window(tokenized.n_tokens, f"text {index}")
        examples.append(TrainingExample(tokenized.ids, tuple(range(1, tokenized.n_tokens))))
    return examples
