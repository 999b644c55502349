"""An answer and its rivals as token ids, at every step that predicts one of the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, read_token, tokenize_label
from metaopt_lens.runs import candidate_labels

# A word as the prompt's template writes a label, a token id, or several token ids.
Answer = str | int | Sequence[int]


@dataclass(frozen=True)
class Target:
    """What is asked of one step: the logit of `token`, less the mean logit of `rivals` where there are any."""

    token: int
    rivals: tuple[int, ...]


def answer_targets(
    model: LensModel,
    prompt: ICLPrompt,
    answer: Answer | None,
    versus: Answer | Sequence[Answer] | None,
    *,
    first_only: bool = False,
) -> tuple[Target, ...]:
    """One target per token of the answer.

    At a step the rivals are those with the same tokens before and another one here; where none is left, the plain
    logit is the target.

    Args:
        model: a wrapped model.
        prompt: gives template, label and candidates.
        answer: None for the prompt's label.
        versus: None for the prompt's other candidates, ``()`` for none.
        first_only: only the first tokens of answer and rivals count.

    Raises:
        PromptError: no answer, an answer of no token, or a rival that no step tells from the answer.
    """
    if answer is None and prompt.label is None:
        raise PromptError(
            f"query {prompt.query!r} has no label: name the answer, as in logits('Paris'), or give the prompt one."
        )
    stop = 1 if first_only else None
    ids = answer_ids(model, prompt, prompt.label if answer is None else answer)[:stop]
    words = candidate_labels(prompt) if versus is None else _several(versus)
    rivals = [answer_ids(model, prompt, word)[:stop] for word in words]
    for rival in rivals if versus is not None else ():
        same = min(len(rival), len(ids))
        if rival[:same] == ids[:same]:
            text = "".join(read_token(token, model.tokenizer) for token in ids[:same])
            raise PromptError(
                f"the answer and its rival begin with the same token, {text!r}, and no later one tells them apart. "
                "Name another rival, or versus=() for the plain logit."
            )
    targets = []
    for step, token in enumerate(ids):
        here = {rival[step] for rival in rivals if rival[:step] == ids[:step] and len(rival) > step}
        targets.append(Target(token, tuple(sorted(here - {token}))))
    return tuple(targets)


def answer_ids(model: LensModel, prompt: ICLPrompt, answer: Answer | None) -> tuple[int, ...]:
    """Token ids of an answer.

    Raises:
        PromptError: no token, or a word that the tokenizer does not know.
        OptionError: a token id that the model does not have.
    """
    if isinstance(answer, str):
        return tokenize_label(answer, prompt.template, model.tokenizer)
    ids = (answer,) if isinstance(answer, int) else tuple(answer or ())
    if not ids:
        raise PromptError("the answer has no token: give a word, a token id, or a list of token ids.")
    for token in ids:
        if not 0 <= token < model.info.d_vocab:
            raise OptionError(f"{model.info.name} has token ids 0 to {model.info.d_vocab - 1}, got {token}.")
    return ids


def _several(versus: Answer | Sequence[Answer]) -> list[Answer]:
    """Rivals as a list: a word or a token id is one rival, a list holds one rival in each place."""
    return [versus] if isinstance(versus, str | int) else list(versus)
