"""Prompts of a synthetic episode: every query that can be asked behind its demonstrations."""

from __future__ import annotations

from metaopt_lens.models.tiny import CATEGORIES, CATEGORY_OF, Episode
from metaopt_lens.prompts import ICLPrompt


def episode_prompts(episode: Episode) -> list[ICLPrompt]:
    """All queries that can be asked behind a synthetic episode's demonstrations: every other noun of its categories.

    Args:
        episode: of the bundled model's task.
    """
    bound = {CATEGORY_OF[noun]: label for noun, label in episode.demos}
    shown = {noun for noun, _ in episode.demos}
    return [
        ICLPrompt(episode.demos, noun, label=label, candidates=episode.candidates)
        for category, label in bound.items()
        for noun in CATEGORIES[category]
        if noun not in shown
    ]
