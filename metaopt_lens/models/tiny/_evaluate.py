"""Accuracy on held-out prompts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt_lens.models.tiny._sampling import Episode, sample_episode
from metaopt_lens.models.tiny._vocabulary import BOS, ID_OF, LABELS, build_tokenizer


def sample_episodes(*, n: int, n_demos: int, n_categories: int, held_out: bool = True, seed: int = 0) -> list[Episode]:
    """`n` episodes from one seed; see `sample_episode`.

    Args:
        n: how many prompts.
        n_demos: demonstrations in each.
        n_categories: categories in each.
        held_out: use label pairings that never occurred in training.
        seed: of the draws.
    """
    rng = random.Random(seed)
    return [sample_episode(rng, n_demos=n_demos, n_categories=n_categories, held_out=held_out) for _ in range(n)]


def accuracy(model: Callable[[Tensor], Any], episodes: list[Episode], *, mark: str = ":") -> dict[str, float]:
    """Fraction of right answers among the prompt's candidate labels, among all labels, and among all tokens.

    Args:
        model: maps token ids ``[batch, pos]`` to logits ``[batch, pos, vocab]``, or to an object that has them as
            ``logits``.
        episodes: the prompts, all with the same number of demonstrations.
        mark: text between input and label.
    """
    tokenizer = build_tokenizer()
    ids = torch.tensor([[BOS, *tokenizer(e.text(mark=mark)).input_ids] for e in episodes])
    with torch.inference_mode():
        output = model(ids)
    logits = getattr(output, "logits", output)[:, -1]  # batch vocab
    labels = [ID_OF[label] for label in LABELS]
    right = {"candidates": 0, "labels": 0, "tokens": 0}
    for row, episode in zip(logits, episodes, strict=True):
        answer = ID_OF[episode.answer]
        choices = {
            "candidates": [ID_OF[label] for label in episode.candidates],
            "labels": labels,
            "tokens": range(len(row)),
        }
        for name, among in choices.items():
            right[name] += max(among, key=row.tolist().__getitem__) == answer
    return {name: count / len(episodes) for name, count in right.items()}


def measure(model: Callable[[Tensor], Any], *, n: int = 1000, seed: int = 1) -> dict[str, dict[str, float]]:
    """Accuracies with 0, 4, 8 and 16 demonstrations of 2, 3 and 4 categories, on `n` held-out prompts each.

    The entries marked "seen" use pairs that did occur in training, for comparison.

    Args:
        model: see `accuracy`.
        n: prompts for each number.
        seed: of the prompts.
    """
    table = {}
    for held_out in (True, False):
        for n_categories in (2, 3, 4):
            for n_demos in (0, 4, 8, 16):
                episodes = sample_episodes(
                    n=n, n_demos=n_demos, n_categories=n_categories, held_out=held_out, seed=seed
                )
                key = f"{'held-out' if held_out else 'seen'}, {n_categories} categories, {n_demos} demos"
                table[key] = accuracy(model, episodes)
    return table
