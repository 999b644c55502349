"""What a model answers: probabilities of whole labels and of its own first choices, in context and zero-shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt, read_token, tokenize_label
from metaopt_lens.runs._scoring import candidate_mass, check_candidates, read_queries, score_candidates

# Below it the model says something else more often than any of the candidates.
SMALL_MASS = 0.5


@dataclass(frozen=True)
class TopToken:
    """A token the model may say next: its text, leading space included, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class VocabularyAnswer:
    """What the model says next, among all tokens of its vocabulary.

    Attributes:
        probabilities: of every whole candidate, the product over its tokens; nothing is renormalised.
        mass: probability that the answer begins with one of the candidates.
        rank: rank of the right label's first token in the whole vocabulary, 1 for the first choice; None if the right
            label is not known.
        top: the most probable next tokens, the first choice first.
    """

    probabilities: Float[Tensor, " candidate"]
    mass: float
    rank: int | None
    top: tuple[TopToken, ...]


@dataclass(frozen=True)
class LabelPrediction:
    """What a model answers to a query: scores of the candidate labels, and its own first choices.

    Attributes:
        labels: the candidates, in the order of the scores; may be one or none.
        correct: the query's label, if known.
        in_context, zero_shot: mean log-probability per token of every candidate, with and without demonstrations.
        in_context_vocabulary, zero_shot_vocabulary: the same two settings in absolute numbers.
    """

    labels: tuple[str, ...]
    correct: str | None
    in_context: Float[Tensor, " candidate"]
    zero_shot: Float[Tensor, " candidate"]
    in_context_vocabulary: VocabularyAnswer
    zero_shot_vocabulary: VocabularyAnswer

    @property
    def in_context_answer(self) -> str | None:
        """The candidate with the best score behind the demonstrations; None without candidates."""
        return self._best(self.in_context)

    @property
    def zero_shot_answer(self) -> str | None:
        """The candidate with the best score without demonstrations; None without candidates."""
        return self._best(self.zero_shot)

    @property
    def in_context_shares(self) -> Float[Tensor, " candidate"]:
        """Probability among the candidates, behind the demonstrations (softmax of the scores)."""
        return self.in_context.softmax(-1)

    @property
    def zero_shot_shares(self) -> Float[Tensor, " candidate"]:
        """Probability among the candidates, without demonstrations."""
        return self.zero_shot.softmax(-1)

    @property
    def mass_note(self) -> str | None:
        """A warning where the candidates together get less than half of the probability (see `small_mass_note`)."""
        masses = {"zero-shot": self.zero_shot_vocabulary.mass, "in context": self.in_context_vocabulary.mass}
        return small_mass_note(masses) if self.labels else None

    def _best(self, scores: Float[Tensor, " candidate"]) -> str | None:
        return self.labels[int(scores.argmax())] if self.labels else None


def small_mass_note(masses: Mapping[str, float]) -> str | None:
    """A sentence that warns of candidates the model seldom says, or None where it says them in at least half of cases.

    Args:
        masses: total probability of the candidates (`VocabularyAnswer.mass`), by the name of the setting.
    """
    small = [f"{mass:.1%} {setting}" for setting, mass in masses.items() if mass < SMALL_MASS]
    if not small:
        return None
    return (
        f"The candidates together have a probability of only {' and '.join(small)}: the model mostly says something "
        "else, so shares among the candidates say little about its answer."
    )


def candidate_labels(prompt: ICLPrompt) -> tuple[str, ...]:
    """The labels to choose from, without repeats.

    The prompt's candidates, or else the labels of its demonstrations; the query's own label is always one of them.
    """
    words = prompt.candidates or [demo.label for demo in prompt.demos if demo.label]
    return tuple(dict.fromkeys([*words, *([] if prompt.label is None else [prompt.label])]))


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
    n_top: int = 5,
) -> LabelPrediction:
    """What a model answers to a prompt, with and without its demonstrations.

    Args:
        model: a wrapped model.
        prompt: the prompt as text.
        tokenized: the same prompt as token ids.
        labels: the candidates; by default those of `candidate_labels`. One or none are scored as well.
        n_top: how many of the model's own first choices to keep.

    Returns:
        Scores and absolute probabilities of the candidates, the model's own first choices and the right label's rank.

    Raises:
        PromptError: two candidates with the same tokens, or one with a word that the tokenizer does not know.
        ContextWindowError: prompt and label do not fit the context window.
    """
    names = candidate_labels(prompt) if labels is None else tuple(dict.fromkeys(labels))
    ids = [tokenize_label(name, prompt.template, model.tokenizer) for name in names]
    if len(names) > 1:
        check_candidates(ids, names)
    right = [] if prompt.label is None else [tokenize_label(prompt.label, prompt.template, model.tokenizer)[:1]]

    def answer(text: TokenizedPrompt) -> tuple[Tensor, VocabularyAnswer]:
        (reading,) = read_queries(model, None, [text.ids], [*ids, *right], n_top=n_top)
        log_probs = reading.log_probs[: len(ids)]
        return reading.scores[: len(ids)], VocabularyAnswer(
            probabilities=log_probs.exp(),
            mass=candidate_mass(log_probs, ids),
            rank=int(reading.ranks[-1]) if right else None,
            top=tuple(TopToken(read_token(token, model.tokenizer), value) for token, value in reading.top),
        )

    with torch.inference_mode():
        in_context, behind_demos = answer(tokenized)
        zero_shot, without_demos = answer(tokenized.zero_shot())
    return LabelPrediction(
        names,
        prompt.label,
        in_context=in_context,
        zero_shot=zero_shot,
        in_context_vocabulary=behind_demos,
        zero_shot_vocabulary=without_demos,
    )
