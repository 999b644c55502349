"""Seeded in-context sequences: nouns labelled by category, under a binding drawn for every prompt."""

from __future__ import annotations

import random
from dataclasses import dataclass

from metaopt_lens._errors import OptionError
from metaopt_lens.models.tiny._vocabulary import CATEGORIES, HELD_OUT_PAIRS, LABELS


@dataclass(frozen=True)
class Episode:
    """One prompt: demonstrations, a query noun that is not among them, and its label under their binding."""

    demos: tuple[tuple[str, str], ...]
    """(noun, label) pairs; every candidate label occurs if there are at least as many demos as categories."""
    query: str
    answer: str
    candidates: tuple[str, ...]
    """The labels bound in this prompt, one per category, in random order; `answer` is one of them."""

    def text(self, *, mark: str = ":") -> str:
        """The prompt as text, for example ``"apple : dax\\nhammer : wug\\npear :"``.

        Args:
            mark: text between input and label.
        """
        lines = [f"{noun} {mark} {label}" for noun, label in self.demos]
        return "\n".join([*lines, f"{self.query} {mark}"])


def sample_binding(rng: random.Random, n_categories: int, *, held_out: bool) -> dict[str, str]:
    """Draw categories and a label for each, all different; only held-out pairs, or none of them.

    Raises `OptionError` if `n_categories` is not between 1 and the number of categories.

    Args:
        rng: source of randomness.
        n_categories: how many categories.
        held_out: use label pairings that never occurred in training.
    """
    if not 1 <= n_categories <= len(CATEGORIES):
        raise OptionError(f"n_categories must be from 1 to {len(CATEGORIES)}, got {n_categories}.")
    names = rng.sample(list(CATEGORIES), n_categories)
    while True:  # independent draws, all redone on a clash: the joint distribution stays uniform
        labels = [
            rng.choice([label for label in LABELS if ((name, label) in HELD_OUT_PAIRS) == held_out]) for name in names
        ]
        if len(set(labels)) == n_categories:
            return dict(zip(names, labels, strict=True))


class _Decks:
    """Nouns of each category in random order, dealt without repeats until a deck is used up."""

    def __init__(self, rng: random.Random, n_nouns: int, without: str | None = None) -> None:
        self._rng, self._n_nouns, self._without = rng, n_nouns, without
        self._decks: dict[str, list[str]] = {}

    def deal(self, category: str) -> str:
        if not self._decks.get(category):
            deck = [noun for noun in CATEGORIES[category][: self._n_nouns] if noun != self._without]
            self._rng.shuffle(deck)
            self._decks[category] = deck
        return self._decks[category].pop()


def sample_stream(rng: random.Random, *, n_items: int, n_categories: int, n_nouns: int = 12) -> list[tuple[str, str]]:
    """A training sequence of (noun, label) pairs under one binding without held-out pairs.

    Only the first `n_nouns` nouns of each category occur: the training curriculum starts with one.
    """
    binding = sample_binding(rng, n_categories, held_out=False)
    names, decks = list(binding), _Decks(rng, n_nouns)
    stream = []
    for _ in range(n_items):
        name = rng.choice(names)
        stream.append((decks.deal(name), binding[name]))
    return stream


def sample_episode(rng: random.Random, *, n_demos: int = 16, n_categories: int = 2, held_out: bool = True) -> Episode:
    """Draw a prompt with `n_demos` demonstrations of `n_categories` categories.

    With `held_out` (the default) the binding has only pairs that never occurred in training, otherwise only
    pairs that did. Every category is demonstrated at least once where `n_demos` allows it, and the query's
    category is drawn independently of the demonstrations. Equal generators give equal episodes.

    Raises `OptionError` for a negative `n_demos` or an impossible `n_categories`.

    Args:
        rng: source of randomness.
        n_demos: how many demonstrations.
        n_categories: categories in the prompt.
        held_out: use label pairings that never occurred in training.
    """
    if n_demos < 0:
        raise OptionError(f"n_demos must not be negative, got {n_demos}.")
    binding = sample_binding(rng, n_categories, held_out=held_out)
    names = list(binding)
    query_category = rng.choice(names)
    query = rng.choice(CATEGORIES[query_category])
    order = rng.sample(names, min(n_demos, n_categories))
    order += rng.choices(names, k=n_demos - len(order))
    rng.shuffle(order)
    decks = _Decks(rng, n_nouns=len(CATEGORIES[query_category]), without=query)
    return Episode(
        demos=tuple((decks.deal(name), binding[name]) for name in order),
        query=query,
        answer=binding[query_category],
        candidates=tuple(rng.sample(list(binding.values()), n_categories)),
    )
