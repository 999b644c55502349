"""One row of the table of statistics: how it is read from runs, what it is, and which nulls it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis._measured import Level, Measured, Unit
from metaopt_lens.analysis._measuring import Context
from metaopt_lens.analysis._output_parts import Part
from metaopt_lens.analysis._query_batch import QueryBatch

Values = Float[Tensor, "query layer head"]
Readings = tuple[Tensor, ...]  # each with the queries first


@dataclass(frozen=True, eq=False)
class Statistic:
    """A similarity of in-context and finetuning updates.

    Attributes:
        name: identifies it in every result; ``{token}`` and the like are filled in from `Context.words`.
        description: what is compared, in which space.
        level: one value a head, or one a layer.
        unit: ``set`` where the demonstrations decide the value and queries behind them repeat it.
        undefined: what makes a value undefined.
        read: what the value is computed from, out of the runs of some queries of one set.
        value: of the readings; NaN where undefined.
        nulls: by name, the same under a null hypothesis that needs no further runs; None where these queries have no
            such null. Further runs (with other labels, updates or weights) are nulls by `value` of their readings.
        read_for_nulls: what only `nulls` need, behind the readings.
        needs_factors: whether the update must have kept its steps' factors.
        from_outputs: whether it reads nothing of the finetuned runs but head outputs.
        part: of output space that is compared; None for all of it. Parts need label words.
    """

    name: str
    description: str
    level: Level
    unit: Unit
    undefined: str
    read: Callable[[QueryBatch], Readings]
    value: Callable[[Readings, Context], Values]
    nulls: Mapping[str, Callable[[Readings, Context], Values | None]]
    read_for_nulls: Callable[[QueryBatch], Readings] = lambda batch: ()  # noqa: ARG005
    needs_factors: bool = False
    from_outputs: bool = False
    part: Part | None = None

    def called(self, context: Context) -> str:
        """Its name, filled in.

        Args:
            context: what the comparison was told.
        """
        return self.name.format(**context.words)

    def measure(self, readings: Readings, context: Context) -> Measured:
        """Value and nulls of all queries of one demonstration set.

        Args:
            readings: of these queries, joined, with those for nulls.
            context: of the comparison.
        """
        nulls = {name: null(readings, context) for name, null in self.nulls.items()}
        return Measured(
            name=self.called(context),
            description=self.description.format(**context.words),
            level=self.level,
            unit=self.unit,
            values=self.value(readings, context).float(),
            nulls={name: values.float() for name, values in nulls.items() if values is not None},
        )


def join_readings(parts: Sequence[Readings]) -> Readings:
    """The readings of successive groups of queries, the last axis filled with 0 to the longest.

    Args:
        parts: one for each group.
    """
    joined = []
    for column in zip(*parts, strict=True):
        longest = max(t.shape[-1] for t in column)
        padded = [t if t.ndim == 1 else torch.nn.functional.pad(t, (0, longest - t.shape[-1])) for t in column]
        joined.append(torch.cat(padded))
    return tuple(joined)
