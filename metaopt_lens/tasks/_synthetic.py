"""Rows of the bundled model's own tasks: nouns labelled by category, under a binding drawn by the seed."""

from __future__ import annotations

import random

from metaopt_lens.models.tiny import CATEGORIES, LABELS, sample_binding
from metaopt_lens.tasks._task import Row, TaskRows

_N_UNRELATED = 16


def synthetic_rows(seed: int, *, n_categories: int = 4) -> TaskRows:
    """All nouns of some categories with made-up labels, in random order; half to learn from, half to ask.

    The pairs of category and label are none that the bundled model was trained on.

    Args:
        seed: of the binding and the order.
        n_categories: how many categories of nouns.
    """
    rng = random.Random(seed)
    binding = sample_binding(rng, n_categories, held_out=True)
    pairs = [(noun, label) for category, label in binding.items() for noun in CATEGORIES[category]]
    rng.shuffle(pairs)
    half = len(pairs) // 2
    others = [noun for category, nouns in CATEGORIES.items() if category not in binding for noun in nouns]
    unused = [label for label in LABELS if label not in binding.values()]
    return TaskRows(
        train=_rows(pairs[:half]),
        validation=_rows(pairs[half:]),
        source=f"{n_categories} categories of nouns with made-up labels",
        unrelated=tuple(f"{noun} : {rng.choice(unused)}" for noun in rng.sample(others, _N_UNRELATED)),
    )


def _rows(pairs: list[tuple[str, str]]) -> tuple[Row, ...]:
    return tuple(Row(noun, label, i) for i, (noun, label) in enumerate(pairs))
