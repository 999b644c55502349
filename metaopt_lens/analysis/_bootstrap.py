"""Confidence intervals by the hierarchical bootstrap: demonstration sets first, then queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens.analysis._checks import Seed, as_generator, check_positive
from metaopt_lens.analysis._statistic import QueryStatistic

CONDITIONAL = "conditional on these demonstrations"
_CHUNK = 1 << 22  # resampling weights held at once


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap percentile interval.

    Attributes:
        estimate: mean over the demonstration sets of each set's mean over its queries.
        low, high: ends of the interval.
        level: nominal coverage.
        n_sets, n_queries: demonstration sets, and queries in all of them.
        n_resamples: bootstrap resamples.
        label: what the interval speaks about. With one set of demonstrations nothing is known of how another
            would do: ``conditional on these demonstrations``.
    """

    estimate: Float[Tensor, ...]
    low: Float[Tensor, ...]
    high: Float[Tensor, ...]
    level: float
    n_sets: int
    n_queries: int
    n_resamples: int
    label: str


def hierarchical_bootstrap(
    values: Float[Tensor, " query *item"] | QueryStatistic,
    *,
    sets: Int[Tensor, " query"] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: Seed,
) -> Interval:
    """Interval of the mean, resampling demonstration sets and then the queries within each drawn set.

    Args:
        values: one number per query, of all sets; NaN (undefined) entries are left out of the means.
        sets: which demonstration set each query was asked behind; one set if not given.
        level: nominal coverage.
        n_resamples: bootstrap resamples.
        seed: of the resampling.

    The percentile interval is too narrow for few sets: with n sets the variance between them comes out
    (n - 1) / n of what it is.
    """
    numbers = values.values if isinstance(values, QueryStatistic) else values
    if not 0 < level < 1:
        raise OptionError(f"level must lie between 0 and 1, got {level}: 0.95 gives a 95 % interval.")
    check_positive(n_resamples=n_resamples, queries=len(numbers))
    if sets is None:
        sets = torch.zeros(len(numbers), dtype=torch.int64)
    if len(sets) != len(numbers):
        raise OptionError(
            f"sets must name a demonstration set for each of the {len(numbers)} queries, got {len(sets)}."
        )
    names = sorted(set(sets.tolist()))
    groups = [numbers[sets == name].double().reshape(int((sets == name).sum()), -1) for name in names]
    bad = [name for name, group in zip(names, groups, strict=True) if bool(_empty(group).any())]
    if bad:
        raise UndefinedMetricError(
            f"demonstration set {bad[0]} has no defined value at some layer: there is no mean to resample. "
            "Leave the set or the layer out."
        )
    generator = as_generator(seed)
    drawn = torch.randint(len(groups), (n_resamples, len(groups)), generator=generator)
    total = torch.zeros(n_resamples, groups[0].shape[1], dtype=torch.float64)
    for index, group in enumerate(groups):
        resample = (drawn == index).nonzero()[:, 0]
        total.index_add_(0, resample, _resampled_means(group, len(resample), generator))
    means = total / len(groups)
    tail = (1 - level) / 2
    low, high = torch.from_numpy(np.quantile(means.numpy(), [tail, 1 - tail], axis=0))  # torch's has a size limit
    shape = numbers.shape[1:]
    return Interval(
        estimate=torch.stack([group.nanmean(0) for group in groups]).mean(0).reshape(shape),
        low=low.reshape(shape),
        high=high.reshape(shape),
        level=level,
        n_sets=len(groups),
        n_queries=len(numbers),
        n_resamples=n_resamples,
        label=CONDITIONAL if len(groups) == 1 else f"over {len(groups)} demonstration sets and their queries",
    )


def _empty(group: Tensor) -> Tensor:
    return group.isnan().all(0)


def _resampled_means(group: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Means of n resamples of the rows, leaving NaN out."""
    size = len(group)
    defined = (~group.isnan()).double()
    filled = group.nan_to_num()
    parts = []
    chunk = max(1, _CHUNK // size)
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        picks = torch.randint(size, (rows, size), generator=generator)
        weights = torch.zeros(rows, size, dtype=torch.float64)
        weights.scatter_add_(1, picks, torch.ones_like(weights))
        # a resample may miss every defined query: it then repeats the group's own mean
        count = weights @ defined
        parts.append(torch.where(count > 0, (weights @ filled) / count, group.nanmean(0)))
    return torch.cat(parts) if parts else torch.zeros(0, group.shape[1], dtype=torch.float64)
