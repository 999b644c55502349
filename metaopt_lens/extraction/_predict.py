"""What a model answers: probabilities of whole labels, in context and zero-shot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import PromptError
from metaopt_lens.extraction._scoring import check_candidates, score_candidates
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt, tokenize_label


@dataclass(frozen=True)
class LabelPrediction:
    """Mean log-probability per token of every candidate label after the query.

    Attributes:
        labels: the candidates, in the order of the scores.
        correct: the query's label, if known.
        in_context: behind the demonstrations; zero_shot: without them.
    """

    labels: tuple[str, ...]
    correct: str | None
    in_context: Float[Tensor, " candidate"]
    zero_shot: Float[Tensor, " candidate"]

    @property
    def in_context_answer(self) -> str:
        """The best candidate behind the demonstrations."""
        return self.labels[int(self.in_context.argmax())]

    @property
    def zero_shot_answer(self) -> str:
        """The best candidate without them."""
        return self.labels[int(self.zero_shot.argmax())]

    @property
    def in_context_shares(self) -> Float[Tensor, " candidate"]:
        """Probability among the candidates, behind the demonstrations (softmax of the scores)."""
        return self.in_context.softmax(-1)

    @property
    def zero_shot_shares(self) -> Float[Tensor, " candidate"]:
        """Probability among the candidates, without demonstrations."""
        return self.zero_shot.softmax(-1)


def candidate_labels(prompt: ICLPrompt) -> tuple[str, ...]:
    """The labels to choose from: the prompt's candidates, or else its demonstrations' labels, without repeats."""
    return tuple(dict.fromkeys(prompt.candidates or [demo.label for demo in prompt.demos]))


def label_log_probs(
    model: LensModel, tokenized: TokenizedPrompt, candidates: Sequence[Sequence[int]]
) -> Float[Tensor, " candidate"]:
    """Mean log-probability of each candidate's tokens where they would follow the prompt.

    Args:
        model: a wrapped model.
        tokenized: the prompt; give ``tokenized.zero_shot()`` for the answer without demonstrations.
        candidates: token ids of the labels (see `tokenize_label`).

    Raises:
        ContextWindowError: prompt and label do not fit the context window.
    """
    return score_candidates(model, None, [tokenized.ids], candidates)[0]


def predict_labels(
    model: LensModel,
    prompt: ICLPrompt,
    tokenized: TokenizedPrompt,
    *,
    labels: Sequence[str] | None = None,
) -> LabelPrediction:
    """Score the candidate labels of a prompt, with and without its demonstrations.

    Args:
        labels: the candidates; by default the prompt's own, or else the labels of its demonstrations.

    Raises:
        PromptError: fewer than two candidates, or two with the same tokens.
    """
    names = candidate_labels(prompt) if labels is None else tuple(dict.fromkeys(labels))
    if len(names) < 2:
        raise PromptError(
            f"a prediction needs at least two candidate labels, got {list(names)}: give the prompt candidates."
        )
    ids = [tokenize_label(name, prompt.template, model.tokenizer) for name in names]
    check_candidates(ids, names)
    with torch.inference_mode():
        in_context = label_log_probs(model, tokenized, ids)
        zero_shot = label_log_probs(model, tokenized.zero_shot(), ids)
    return LabelPrediction(names, prompt.label, in_context=in_context, zero_shot=zero_shot)
