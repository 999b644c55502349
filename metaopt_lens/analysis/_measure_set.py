"""Everything that is measured behind one demonstration set, batch by batch; only what is per query is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.analysis._label_answers import Answers, Choices, join_answers
from metaopt_lens.analysis._low_rank import MemoryBatch
from metaopt_lens.analysis._measured import Measured
from metaopt_lens.analysis._measuring import Context, timed
from metaopt_lens.analysis._null_names import UPHILL, UPHILL_EVEN, UPHILL_ODD
from metaopt_lens.analysis._output_space import Labels, OutputSpace
from metaopt_lens.analysis._query_batch import QueryBatch, join_norms, norms_of
from metaopt_lens.analysis._similarity import rounding_unit
from metaopt_lens.analysis._statistic import Readings, Statistic, join_readings
from metaopt_lens.analysis._statistics import STATISTICS
from metaopt_lens.finetuning import WeightUpdate, updated_memory
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs import (
    CHANGED,
    SETTINGS,
    Keep,
    Recorder,
    Runs,
    Setting,
    Wanted,
    batches,
    prepare,
    queries_together,
)

_PLAIN: dict[Setting, Setting] = {"ft": "zs", "ft_matched": "zs_matched"}
_ANSWERED: dict[str, Setting] = {"ZS": "zs", "ICL": "icl", "FT": "ft"}


@dataclass(frozen=True, eq=False)
class Variant:
    """A set's queries on some model, behind some demonstrations, with some update.

    Attributes:
        null: which null its statistics are; several variants of one name are draws, which are averaged.
        space: of the model.
        tokenized: the queries.
        update: of the finetuned settings.
        settings: runs that differ from the set's own; only these are made.
        answered: also what is answered.
    """

    null: str
    space: OutputSpace
    tokenized: Sequence[TokenizedPrompt]
    update: WeightUpdate
    settings: tuple[Setting, ...] = SETTINGS
    answered: bool = False

    def prepare(self, asked: tuple[int, ...]) -> Recorder:
        """Run what stands before the queries.

        Args:
            asked: token ids whose logits are kept, if this variant is answered.
        """
        keep = Keep(raw_q=True, own_stream=True, logits=asked if self.answered else ())
        return prepare(self.space.model, self.tokenized[0], Wanted(self.settings, self.update, keep=keep))


@dataclass(frozen=True, eq=False)
class SetMeasures:
    """What came out for one demonstration set, its queries in order.

    Attributes:
        statistics: with all nulls.
        norms: by name.
        answers: by setting, ``ZS``, ``ICL`` and ``FT``; empty without candidates.
        controlled: predicted candidates in context under a null, one row a draw.
    """

    statistics: list[Measured]
    norms: dict[str, Float[Tensor, "query layer head"]]
    answers: dict[str, Answers]
    controlled: dict[str, Int[Tensor, "draw query"]]


@dataclass
class _Found:
    """The same for one batch: readings of the statistics, and values of the variants by null, one a draw."""

    readings: dict[str, Readings] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)
    values: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    controlled: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, null: str, batch: QueryBatch, statistics: Sequence[Statistic], context: Context) -> None:
        """Take the statistics of a variant as one draw of a null."""
        values = {s.name: s.value(s.read(batch), context).float() for s in statistics}
        self.values.setdefault(null, []).append(values)


def measure_set(
    own: Variant,
    variants: Sequence[Variant],
    context: Context,
    *,
    trained: Sequence[Float[Tensor, "_ layer d_q"]] | None,
    choices: Choices | None,
    batch_size: int | None,
    labels: Sequence[Labels] | None = None,
) -> SetMeasures:
    """Run a set's queries in all settings and every variant, and measure them.

    Args:
        own: the set itself.
        variants: whose statistics are nulls.
        context: of the comparison.
        trained: see `QueryBatch`.
        choices: what the queries choose among; None for no answers.
        batch_size: queries run together; by default as many as memory allows.
        labels: of every query, the first tokens of its label words, to split updates by; None to split none.

    Raises:
        NonFiniteError: NaN or infinity in the activations.
    """
    words = () if choices is None else choices.asked
    recorders = [(variant, variant.prepare(words)) for variant in (own, *variants)]
    tokens = own.tokenized
    size = queries_together(own.space.model, tokens, own.settings) if batch_size is None else batch_size
    parts: list[_Found] = []
    rows: list[int] = []
    known = None if trained is None else tuple(trained)

    def measure(row_numbers: list[int]) -> list[_Found]:
        own_labels = None if labels is None else tuple(labels[row] for row in row_numbers)
        return [_measure_batch(recorders, row_numbers, context, own_labels, known, asked)]

    asked = None if choices is None else _Asked(choices, batch_size)
    for chosen, found in batches(
        range(len(tokens)),
        lambda row: len(tokens[row].query),
        measure,
        batch_size=size,
    ):
        rows += chosen
        parts += found
    return _join(
        parts, torch.tensor(rows).argsort(), dataclasses.replace(context, eps=rounding_unit(own.space.model.info.dtype))
    )


def _measure_batch(
    recorders: Sequence[tuple[Variant, Recorder]],
    rows: list[int],
    context: Context,
    labels: tuple[Labels, ...] | None,
    trained: tuple[Tensor, ...] | None,
    asked: _Asked | None,
) -> _Found:
    found = _Found()
    (own, recorder), *others = recorders
    runs = recorder.runs([own.tokenized[row] for row in rows])
    batch = dataclasses.replace(_batch(own, runs, context), labels=labels, trained=trained)
    context = dataclasses.replace(context, eps=batch.eps)
    for statistic in _readable(batch):
        found.readings[statistic.name] = (*statistic.read(batch), *statistic.read_for_nulls(batch))
    found.norms = norms_of(batch)
    if asked is not None:
        found.answers = {name: asked.behind(runs, setting, rows, own) for name, setting in _ANSWERED.items()}
    for variant, recorder in others:
        with timed(context.seconds, variant.null):
            made = recorder.runs([variant.tokenized[row] for row in rows])
            mixed = [Runs({**a.by_setting, **b.by_setting}) for a, b in zip(runs, made, strict=True)]
            same_memory = batch.memory if variant.settings == ("icl",) else None
            other = dataclasses.replace(_batch(variant, mixed, context, same_memory), labels=labels, base=batch)
            found.add(variant.null, other, _readable(other), context)
            if variant.null == UPHILL:
                _add_halves(found, batch, runs, made, context)
            if asked is not None and variant.answered:
                best = asked.behind(made, "icl", rows, variant).best
                found.controlled.setdefault(variant.null, []).append(best)
    return found


def _add_halves(
    found: _Found, batch: QueryBatch, downhill: Sequence[Runs], uphill: Sequence[Runs], context: Context
) -> None:
    """Odd and even part of finetuning's update in the learning rate, of everything that reads head outputs."""
    statistics = [s for s in _readable(batch) if s.from_outputs]
    for null, sign in ((UPHILL_ODD, -1), (UPHILL_EVEN, 1)):
        runs = tuple(_half(down, up, sign) for down, up in zip(downhill, uphill, strict=True))
        half = dataclasses.replace(batch, runs=runs, trained=None, base=batch)
        found.add(null, half, statistics, context)
        if null == UPHILL_EVEN:
            sizes = half.change("ft", "zs").norm(dim=-1) / batch.change("ft", "zs").norm(dim=-1)
            found.norms["ft_even_share"] = sizes.float()


def _half(downhill: Runs, uphill: Runs, sign: int) -> Runs:
    """Runs with ``z^ZS + (u(lr) + sign u(-lr)) / 2`` in the finetuned settings, u the change of z."""
    halves = {}
    for setting, plain in _PLAIN.items():
        down, up, zs = downhill[setting].z.double(), uphill[setting].z.double(), downhill[plain].z.double()
        z = zs + ((down - zs) + sign * (up - zs)) / 2
        halves[setting] = dataclasses.replace(downhill[setting], z=z.to(downhill[setting].z.dtype))
    return Runs({**downhill.by_setting, **halves})


def _batch(
    variant: Variant,
    runs: Sequence[Runs],
    context: Context,
    memory: MemoryBatch | None = None,
) -> QueryBatch:
    if memory is None:
        icl = [r.icl for r in runs]
        memories = updated_memory(variant.space.model, variant.update, [r.zs_matched for r in runs])
        memory = MemoryBatch.of(memories, icl, subspace_dim=context.subspace_dim)
    return QueryBatch(variant.space, variant.update, tuple(runs), memory, context)


def _readable(batch: QueryBatch) -> list[Statistic]:
    return [
        row
        for row in STATISTICS
        if (batch.trained is not None or not row.needs_factors) and (batch.labels is not None or row.part is None)
    ]


@dataclass(frozen=True, eq=False)
class _Asked:
    """What the queries choose among, and how many are asked together."""

    choices: Choices
    batch_size: int | None

    def behind(self, runs: Sequence[Runs], setting: Setting, rows: list[int], variant: Variant) -> Answers:
        """Answers of recorded runs, or behind what stood before their queries where labels have several tokens."""
        if self.choices.asked:
            return self.choices.recorded([r[setting] for r in runs], rows)
        model, prefix = variant.space.model, runs[0][setting].prefix
        acting = variant.update.applied(model) if setting in CHANGED else nullcontext()
        with acting:
            return self.choices.answers(model, prefix, rows, batch_size=self.batch_size)


def _join(parts: Sequence[_Found], order: Tensor, context: Context) -> SetMeasures:
    statistics = []
    for row in STATISTICS:
        if row.name in parts[0].readings:
            readings = join_readings([part.readings[row.name] for part in parts])
            measured = row.measure(tuple(t[order] for t in readings), context)
            statistics.append(dataclasses.replace(measured, nulls=measured.nulls | _nulls(parts, row.name, order)))
    return SetMeasures(
        statistics=statistics,
        norms={name: t[order] for name, t in join_norms([part.norms for part in parts]).items()},
        answers={name: join_answers([part.answers[name] for part in parts])[order] for name in parts[0].answers},
        controlled={
            name: torch.stack(
                [torch.cat(draw)[order] for draw in zip(*(p.controlled[name] for p in parts), strict=True)]
            )
            for name in parts[0].controlled
        },
    )


def _nulls(parts: Sequence[_Found], name: str, order: Tensor) -> dict[str, Tensor]:
    """Mean over the draws of every null that comes from further runs."""
    nulls = {}
    for null, draws in parts[0].values.items():
        if name in draws[0]:
            joined = [torch.cat([part.values[null][i][name] for part in parts]) for i in range(len(draws))]
            nulls[null] = torch.stack(joined).nanmean(0)[order]
    return nulls
