"""Which rows become demonstrations, and in what order."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from metaopt_lens._errors import DataError, OptionError
from metaopt_lens.tasks._task import Row

Selection = Literal["random", "balanced", "nearest"]
SELECTIONS: tuple[Selection, ...] = ("random", "balanced", "nearest")
_WORD = re.compile(r"\w+")


def select_demos(
    rows: Sequence[Row],
    n: int,
    *,
    seed: int,
    selection: str = "balanced",
    permutation: int = 0,
    queries: Sequence[str] = (),
) -> tuple[Row, ...]:
    """Choose `n` demonstrations.

    Args:
        rows: the rows to choose from.
        n: how many demonstrations.
        seed: of the choice (``"nearest"`` has none).
        selection: ``"random"``; ``"balanced"``: as many rows of every label, as far as `n` can be divided;
            ``"nearest"``: those most similar to all `queries` together (TF-IDF cosine), the most similar last.
        permutation: 0 keeps the order of the choice, any other number is the seed of a new order.
        queries: texts of the queries, for ``nearest``.

    Raises:
        DataError: too few rows, or too few of a label.
        OptionError: an unknown selection, or ``"nearest"`` without queries.
    """
    if selection not in SELECTIONS:
        raise OptionError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}.")
    if n > len(rows):
        raise DataError(
            f"{n} demonstrations are asked for but there are only {len(rows)} rows: lower the number of shots."
        )
    rng = random.Random(seed)
    if selection == "nearest":
        if not queries:
            raise OptionError("selection 'nearest' needs the queries that the demonstrations should be near to.")
        scores = similarity([row.input for row in rows], queries)
        best = sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:n]
        chosen = [rows[i] for i in reversed(best)]
    elif selection == "balanced":
        chosen = _balanced(rows, n, rng)
    else:
        chosen = rng.sample(list(rows), n)
    if permutation:
        random.Random(permutation).shuffle(chosen)
    return tuple(chosen)


def _balanced(rows: Sequence[Row], n: int, rng: random.Random) -> list[Row]:
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    labels = rng.sample(sorted(by_label), len(by_label))
    chosen: list[Row] = []
    for place, label in enumerate(labels):
        wanted = n // len(labels) + (place < n % len(labels))
        if wanted > len(by_label[label]):
            raise DataError(
                f"a balanced choice of {n} demonstrations needs {wanted} rows labelled {label!r}, but there are "
                f"{len(by_label[label])}: lower the number of shots, or choose selection 'random'."
            )
        chosen += rng.sample(by_label[label], wanted)
    rng.shuffle(chosen)
    return chosen


def similarity(texts: Sequence[str], queries: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Cosine of every text's TF-IDF vector to the mean of the queries' unit vectors."""
    bags = [Counter(_WORD.findall(text.lower())) for text in texts]
    seen = Counter(word for bag in bags for word in bag)
    idf = {word: math.log(1 + len(bags) / count) for word, count in seen.items()}
    target: Counter[str] = Counter()
    for query in queries:
        vector = _weighted(Counter(_WORD.findall(query.lower())), idf)
        for word, weight in vector.items():
            target[word] += weight  # type: ignore[assignment]
    return np.array([sum(w * target.get(word, 0.0) for word, w in _weighted(bag, idf).items()) for bag in bags])


def _weighted(bag: Counter[str], idf: dict[str, float]) -> dict[str, float]:
    vector = {word: count * idf[word] for word, count in bag.items() if word in idf}
    size = math.sqrt(sum(weight * weight for weight in vector.values())) or 1.0
    return {word: weight / size for word, weight in vector.items()}
