"""The same task with other label words: flipped, so that each stands for another one, or neutral."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from metaopt_lens._errors import PromptError
from metaopt_lens.analysis._nulls import derangement
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import Demo, ICLPrompt, read_token, tokenize_label

LabelWords = Literal["natural", "flipped", "neutral"]
LABEL_WORDS: tuple[LabelWords, ...] = ("natural", "flipped", "neutral")
# Words that say nothing of any usual class; those that are a single token of the tokenizer are taken first.
_NEUTRAL = ("foo", "bar", "baz", "alpha", "beta", "gamma", "delta", "omega", "north", "south", "red", "blue", "A", "B")


def flip_map(words: Sequence[str], *, seed: int) -> dict[str, str]:
    """A permutation of label words that leaves none in its place, drawn uniformly.

    Args:
        words: different label words.
        seed: of the permutation.

    Raises:
        PromptError: there are fewer than two.
    """
    if len(words) < 2:
        raise PromptError(f"labels cannot be flipped: all demonstrations have the same one ({', '.join(words)}).")
    return {word: words[i] for word, i in zip(words, derangement(len(words), seed=seed).tolist(), strict=True)}


def neutral_map(model: LensModel, prompts: Sequence[ICLPrompt], words: Sequence[str], *, seed: int) -> dict[str, str]:
    """Neutral words in place of label words: single tokens that stand in no prompt, with different first tokens.

    A list of ours comes first; where the tokenizer has too few of them, words of its vocabulary in random order.

    Args:
        model: a wrapped model with a tokenizer.
        prompts: whose words are not taken.
        words: the label words to replace.
        seed: of the order.

    Raises:
        PromptError: the tokenizer has too few such words.
    """
    taken = {part for p in prompts for text in _texts(p) for part in text.split()} | set(words)
    template, tokenizer = prompts[0].template, model.tokenizer
    order = list(range(model.info.d_vocab))
    random.Random(seed).shuffle(order)
    found: dict[tuple[int, ...], str] = {}
    vocabulary = (read_token(token, tokenizer).strip() for token in order)
    for word in (*_NEUTRAL, *(word for word in vocabulary if word.isascii() and word.isalnum() and len(word) > 1)):
        if len(found) == len(words):
            break
        if word in taken:
            continue
        try:
            ids = tokenize_label(word, template, tokenizer)
        except PromptError:
            continue  # a word that the tokenizer does not know
        if len(ids) == 1:
            found.setdefault(ids, word)
    if len(found) < len(words):
        raise PromptError(
            f"{len(words)} neutral label words are needed, but the tokenizer has only {len(found)} words of a single "
            "token that stand in no prompt: take flipped labels."
        )
    chosen = list(found.values())
    random.Random(seed).shuffle(chosen)
    return dict(zip(words, chosen, strict=True))


def label_map(
    model: LensModel, prompts: Sequence[ICLPrompt], labels: LabelWords, *, words: Sequence[str] | None = None, seed: int
) -> dict[str, str]:
    """Which word stands for each label word of some prompts.

    Args:
        model: a wrapped model; its tokenizer chooses neutral words.
        prompts: with the same demonstrations.
        labels: which words.
        words: the label words; by default those of the demonstrations.
        seed: of the draw.

    Raises:
        PromptError: open answers, in which every demonstration has a label of its own; or see `flip_map` and
            `neutral_map`.
    """
    shown = [demo.label for demo in prompts[0].demos]
    names = list(dict.fromkeys(shown)) if words is None else list(words)
    if labels == "natural":
        return {word: word for word in names}
    if words is None and len(names) == len(shown) > 1:
        raise PromptError(
            f"labels cannot be {_MADE[labels]} in a task of open answers, in which every demonstration has a label of "
            "its own: take a task with label words that occur several times, or natural labels."
        )
    return flip_map(names, seed=seed) if labels == "flipped" else neutral_map(model, prompts, names, seed=seed)


_MADE = {"flipped": "flipped", "neutral": "made neutral"}


def relabelled(prompt: ICLPrompt, words: Mapping[str, str]) -> ICLPrompt:
    """A prompt with other label words: in its demonstrations, its own label and its candidates.

    Args:
        prompt: left as it is.
        words: the new word of each label word; others stay.
    """
    return dataclasses.replace(
        prompt,
        demos=tuple(Demo(demo.input, words.get(demo.label, demo.label)) for demo in prompt.demos),
        label=None if prompt.label is None else words.get(prompt.label, prompt.label),
        candidates=None if prompt.candidates is None else tuple(words.get(word, word) for word in prompt.candidates),
    )


def _texts(prompt: ICLPrompt) -> list[str]:
    own = [prompt.query, prompt.instruction or "", prompt.label or "", *(prompt.candidates or ())]
    return [*own, *(text for demo in prompt.demos for text in (demo.input, demo.label))]
