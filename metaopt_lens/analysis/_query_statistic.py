"""A number per query that may be undefined for some: masked, never silently 0 or NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError


@dataclass(frozen=True)
class QueryStatistic:
    """One number per query, and per layer and head where they follow.

    Attributes:
        values: the numbers in float64; NaN stands exactly where the statistic is undefined.
        undefined_because: what makes it undefined there.
    """

    values: Float[Tensor, "query ..."]
    undefined_because: str

    @property
    def defined(self) -> Bool[Tensor, "query ..."]:
        """Where there is a number."""
        return ~self.values.isnan()

    @property
    def n_defined(self) -> Int[Tensor, ...]:
        """How many queries have a number, per layer (and head)."""
        return self.defined.sum(0)

    def require(self) -> Float[Tensor, "query ..."]:
        """The numbers, or `UndefinedMetricError` if any is undefined."""
        missing = int((~self.defined).sum())
        if missing:
            raise UndefinedMetricError(
                f"{missing} of {self.values.numel()} values are undefined: {self.undefined_because}. "
                "Use .mean(), which leaves them out, or .defined to select."
            )
        return self.values

    def mean(self) -> Float[Tensor, ...]:
        """Mean over the queries that have a number; `UndefinedMetricError` if a layer has none at all."""
        empty = int((self.n_defined == 0).sum())
        if empty:
            raise UndefinedMetricError(
                f"no query gives a value at {empty} of {self.n_defined.numel()} places "
                f"({len(self.values)} queries): {self.undefined_because}."
            )
        return self.values.nanmean(0)

    def over_last(self) -> QueryStatistic:
        """Mean over the last axis (the heads); undefined where every entry is."""
        return QueryStatistic(self.values.nanmean(-1), self.undefined_because)

    def select(self, queries: Bool[Tensor, " query"]) -> QueryStatistic:
        """The same for some of the queries.

        Args:
            queries: which.
        """
        return QueryStatistic(self.values[queries], self.undefined_because)

    @staticmethod
    def concatenate(parts: list[QueryStatistic]) -> QueryStatistic:
        """Join the statistics of successive groups of queries.

        Args:
            parts: the statistics, in order.
        """
        return QueryStatistic(torch.cat([part.values for part in parts]), parts[0].undefined_because)
