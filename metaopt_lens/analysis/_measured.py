"""What came out for one statistic: its values, and what chance and controls give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis._null_names import OTHER_QUERY

Level = Literal["head", "layer"]
Unit = Literal["query", "set"]


@dataclass(frozen=True, eq=False)
class Measured:
    """One statistic, for every query, layer and (at head level) head, with what it would be by chance.

    Attributes:
        name: for example ``"z total"``.
        description: what is compared, in which space.
        level: at layer level the head axis has length 1.
        unit: ``set`` where the demonstrations decide the value and queries behind them repeat it.
        values: NaN where undefined.
        nulls: by name, the same statistic under a null hypothesis, per query (averaged over draws).
    """

    name: str
    description: str
    level: Level
    unit: Unit
    values: Float[Tensor, "query layer head"]
    nulls: dict[str, Float[Tensor, "query layer head"]]

    @property
    def main_null(self) -> str:
        """The null that the excess is taken over: another query's update where there is one, else the first."""
        return OTHER_QUERY if OTHER_QUERY in self.nulls else next(iter(self.nulls))

    @property
    def excess(self) -> Float[Tensor, "query layer head"]:
        """Values above the main null."""
        return self.values - self.nulls[self.main_null]

    @property
    def n_undefined(self) -> int:
        """How many values are undefined, and left out of every mean, interval and p value."""
        return int(self.values.isnan().sum())
