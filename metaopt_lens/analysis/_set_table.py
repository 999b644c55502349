"""One number per demonstration set, quantity and null: what t intervals over sets are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis._comparison_tables import hits_by_setting
from metaopt_lens.analysis._further import Further
from metaopt_lens.analysis._further_questions import further_questions
from metaopt_lens.analysis._interval import set_means
from metaopt_lens.analysis._recall import rec2ftp

if TYPE_CHECKING:
    import pandas as pd

    from metaopt_lens.analysis._comparison import Comparison

REC2FTP, BASE_RATE = "Rec2FTP %", "base rate"
_PerSet = Float[Tensor, " demo_set"]


class _Quantity(NamedTuple):
    """A quantity (``null`` empty) or what a null gives in its place; `excess` of the quantity over it."""

    name: str
    null: str
    value: _PerSet
    excess: _PerSet | None = None


def set_table(comparison: Comparison) -> pd.DataFrame:
    """See `Comparison.set_means`.

    Args:
        comparison: any.
    """
    import pandas as pd

    numbers = sorted(set(comparison.sets.tolist()))
    frames = []
    for row in (*_similarities(comparison), *_answers(comparison), *_further(comparison)):
        excess = torch.full_like(row.value, torch.nan) if row.excess is None else row.excess
        frames.append(
            pd.DataFrame(
                {
                    "set": numbers,
                    "quantity": row.name,
                    "null": row.null,
                    "value": row.value.double().numpy(),
                    "excess": excess.double().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _similarities(comparison: Comparison) -> Iterator[_Quantity]:
    def mean(values: Tensor) -> Tensor:
        return set_means(values.nanmean((1, 2)), comparison.sets)

    for statistic in comparison.statistics:
        yield _Quantity(statistic.name, "", mean(statistic.values))
        for name, null in statistic.nulls.items():
            yield _Quantity(statistic.name, name, mean(null), mean(statistic.values - null))


def _answers(comparison: Comparison) -> Iterator[_Quantity]:
    try:
        hits = hits_by_setting(comparison)
        right = comparison.correct()
    except UndefinedMetricError:  # a single candidate: nothing to predict
        return
    for name, values in hits.items():
        yield _Quantity(f"accuracy {name}", "", set_means(values, comparison.sets))
    recalled, base = [], []
    for index in sorted(set(comparison.sets.tolist())):
        found = rec2ftp(*(right[name][comparison.sets == index] for name in ("ZS", "ICL", "FT")))
        recalled.append(torch.nan if found.value is None else found.value)
        base.append(torch.nan if found.base_rate is None else found.base_rate)
    value, rate = torch.tensor(recalled, dtype=torch.float64), torch.tensor(base, dtype=torch.float64)
    yield _Quantity(REC2FTP, "", value)
    yield _Quantity(REC2FTP, BASE_RATE, rate, value - rate)


def _further(comparison: Comparison) -> Iterator[_Quantity]:
    if comparison.further is None:
        return
    for question in further_questions(comparison.further):
        yield _Quantity(question.key, "", set_means(question.values, comparison.sets))
    for name, values in _explained(comparison.further):
        yield _Quantity(name, "", set_means(values.nanmean((1, 2)), comparison.sets))


def _explained(found: Further) -> Iterator[tuple[str, Tensor]]:
    """Held-out R^2 of everything that explains the in-context updates."""
    items = {
        "ceiling": None if found.ceiling is None else (found.ceiling["value"], found.ceiling.sets),
        "ladder": None if found.ladder is None else (found.ladder.explained, found.ladder.sets),
        "algebra": None if found.algebra is None else (found.algebra.additivity, found.algebra.sets),
    }
    for key, item in items.items():
        if item is not None:
            explained, sets = item
            for name in explained.errors:
                yield f"{key}, R^2: {name}", explained.r_squared(name, sets)
