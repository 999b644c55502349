"""What a model answers: probabilities of whole labels and of its own first choices, in context and zero-shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import PromptError
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt, read_token, tokenize_label
from metaopt_lens.runs._prompt_run import Run, Runs, Setting
from metaopt_lens.runs._scoring import (
    QueryReading,
    candidate_mass,
    check_candidates,
    read_queries,
    read_run,
    score_candidates,
)

# How many of the model's own first choices are kept.
N_TOP = 5
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
    runs: Runs | None = None,
) -> LabelPrediction:
    """What a model answers to a prompt, with and without its demonstrations.

    Args:
        model: a wrapped model.
        prompt: the prompt as text.
        tokenized: the same prompt as token ids.
        labels: the candidates; by default those of `candidate_labels`. One or none are scored as well.
        runs: of this prompt, in context and zero-shot: what was kept of them (see `keep_answers`) is read; for other
            labels, and those of several tokens, the model is run as it is now.

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

    def answer(text: TokenizedPrompt, setting: Setting) -> tuple[Tensor, VocabularyAnswer]:
        run = runs[setting] if runs is not None and setting in runs else None
        reading = _reading(model, text, run, [*ids, *right])
        log_probs = reading.log_probs[: len(ids)]
        return reading.scores[: len(ids)], VocabularyAnswer(
            probabilities=log_probs.exp(),
            mass=candidate_mass(log_probs, ids),
            rank=int(reading.ranks[-1]) if right else None,
            top=tuple(TopToken(read_token(token, model.tokenizer), value) for token, value in reading.top),
        )

    with torch.inference_mode():
        in_context, behind_demos = answer(tokenized, "icl")
        zero_shot, without_demos = answer(tokenized.zero_shot(), "zs")
    return LabelPrediction(
        names,
        prompt.label,
        in_context=in_context,
        zero_shot=zero_shot,
        in_context_vocabulary=behind_demos,
        zero_shot_vocabulary=without_demos,
    )


def keep_answers(model: LensModel, prompts: Sequence[ICLPrompt]) -> tuple[int, ...]:
    """What to keep of the prompts' runs (`Keep.logits`), so that their answers need no pass of their own.

    Args:
        model: a wrapped model.
        prompts: as text.

    Returns:
        The first tokens of all candidate labels that the tokenizer knows. Labels of several tokens need passes for the
        others all the same.
    """
    found = set()
    for word, template in {(word, prompt.template) for prompt in prompts for word in candidate_labels(prompt)}:
        with suppress(PromptError):  # said by `predict_labels`, if anyone asks
            found.add(tokenize_label(word, template, model.tokenizer)[0])
    return tuple(sorted(found))


def _reading(
    model: LensModel, text: TokenizedPrompt, run: Run | None, candidates: Sequence[tuple[int, ...]]
) -> QueryReading:
    """What the model says after a prompt, from its run as far as that was kept."""
    at_end = run is not None and run.destinations[-1] == text.n_tokens - 1
    if run is not None and at_end and run.top_tokens is not None and run.top_tokens.shape[-1] == N_TOP:
        unknown = [label for label in candidates if len(label) > 1 or label[0] not in run.asked]
        if not unknown:
            return read_run(run, candidates)
    return read_queries(model, None, [text.ids], candidates, n_top=N_TOP)[0]
