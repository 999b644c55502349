"""One comparison out of several that were made one demonstration set at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt_lens._errors import ModelMismatchError, OptionError
from metaopt_lens.analysis import Comparison, join_answers, join_further, join_measured


def join_comparisons(parts: Sequence[Comparison]) -> Comparison:
    """The comparison over all demonstration sets of `parts`, in order.

    Statistics and nulls that not every part has are left out. Predictions count candidates as in their own part.

    Raises:
        OptionError: no parts.
        ModelMismatchError: parts of different models.
    """
    if not parts:
        raise OptionError("there is no comparison to join.")
    first = parts[0]
    for part in parts[1:]:
        if part.model != first.model:
            raise ModelMismatchError(f"cannot join comparisons of {first.model.name} and {part.model.name}.")
    offsets = [sum(len(p.n_demos) for p in parts[:i]) for i in range(len(parts))]

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(t is None for t in found) else torch.cat(found)

    settings = {**first.settings, "finetuning": [s for part in parts for s in part.settings["finetuning"]]}
    if any(part.settings["candidates"] != first.settings["candidates"] for part in parts):
        settings["candidates"] = None
    return dataclasses.replace(
        first,
        statistics=join_measured([part.statistics for part in parts]),
        sets=torch.cat([part.sets + offset for part, offset in zip(parts, offsets, strict=True)]),
        norms={name: torch.cat([part.norms[name] for part in parts]) for name in first.norms},
        gold=joined("gold"),
        zs=joined("zs"),
        icl=joined("icl"),
        ft=joined("ft"),
        flipped_gold=joined("flipped_gold"),
        controlled={
            name: torch.cat([part.controlled[name] for part in parts], dim=1)
            for name in first.controlled
            if all(name in part.controlled for part in parts)
        },
        n_demos=tuple(n for part in parts for n in part.n_demos),
        answers={
            name: join_answers([part.answers[name] for part in parts])
            for name in first.answers
            if all(name in part.answers for part in parts)
        },
        settings=settings,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        learning_rate=None,
        further=join_further([part.further for part in parts]),
        updates=tuple(update for part in parts for update in part.updates),
    )
