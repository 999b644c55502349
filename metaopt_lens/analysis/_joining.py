"""One comparison out of what was measured behind each demonstration set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt_lens._storage import provenance
from metaopt_lens.analysis._comparison import Comparison
from metaopt_lens.analysis._demo_sets import TrainedSet
from metaopt_lens.analysis._label_answers import Words, gold_of, join_answers
from metaopt_lens.analysis._measured import Measured
from metaopt_lens.analysis._set_controls import SetFound
from metaopt_lens.models import ModelInfo
from metaopt_lens.prompts import ICLPrompt


def join_sets(
    model: ModelInfo,
    prompts: Sequence[ICLPrompt],
    sets: Sequence[TrainedSet],
    words: Words | None,
    found: Sequence[SetFound],
    settings: dict[str, Any],
) -> Comparison:
    """All sets together, the queries in the order of the prompts.

    Args:
        model: what was compared.
        prompts: all queries.
        sets: which of them stand behind the same demonstrations.
        words: what the queries choose among; None for no predictions.
        found: what came out for each set.
        settings: of the comparison.
    """
    order = torch.tensor([index for group in sets for index in group.indices]).argsort()
    measures = [f.measures for f in found]
    answers = {name: join_answers([m.answers[name] for m in measures])[order] for name in measures[0].answers}
    shared = [name for name in measures[0].norms if all(name in m.norms for m in measures)]
    best = {name: answers[name].best if name in answers else None for name in ("ZS", "ICL", "FT")}
    return Comparison(
        model=model,
        statistics=join_measured([m.statistics for m in measures], order),
        sets=torch.cat([torch.full((len(group.prompts),), i) for i, group in enumerate(sets)])[order],
        norms={name: torch.cat([m.norms[name] for m in measures])[order] for name in shared},
        gold=None if words is None else torch.tensor([gold_of(p, words.names) for p in prompts]),
        zs=best["ZS"],
        icl=best["ICL"],
        ft=best["FT"],
        flipped_gold=None if words is None else _flipped_gold(found, words, order),
        controlled={
            name: torch.cat([f.controlled[name] for f in found], dim=1)[:, order]
            for name in found[0].controlled
            if all(name in f.controlled for f in found)
        },
        n_demos=tuple(len(group.prompts[0].demos) for group in sets),
        answers=answers,
        settings=settings,
        provenance=provenance(),
        notes=tuple(dict.fromkeys(note for f in found for note in f.notes)),
    )


def join_measured(parts: Sequence[Sequence[Measured]], order: Tensor | None = None) -> tuple[Measured, ...]:
    """Concatenate the statistics of several sets; statistics and nulls that not every one has are dropped.

    Args:
        parts: of each set.
        order: of the queries in the result; as they come if not given.
    """
    joined = []
    by_name = [{s.name: s for s in part} for part in parts]
    for name, first in by_name[0].items():
        found = [statistics[name] for statistics in by_name if name in statistics]
        shared = [null for null in first.nulls if all(null in one.nulls for one in found)]
        if len(found) < len(parts) or not shared:
            continue
        nulls = {null: torch.cat([one.nulls[null] for one in found]) for null in shared}
        values = torch.cat([one.values for one in found])
        if order is not None:
            values, nulls = values[order], {null: t[order] for null, t in nulls.items()}
        joined.append(dataclasses.replace(first, values=values, nulls=nulls))
    return tuple(joined)


def _flipped_gold(found: Sequence[SetFound], words: Words, order: Tensor) -> Tensor | None:
    """What a learner of the flipped demonstrations answers; None where a set has nothing to flip."""
    flipped = [f.flipped for f in found if f.flipped is not None]
    if len(flipped) < len(found):
        return None
    return torch.tensor([gold_of(p, words.names) for group in flipped for p in group])[order]
