"""What the similarities of two updates of a head compare, and the same split by where in output space it lies."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from metaopt_lens.analysis._measuring import Context
from metaopt_lens.analysis._null_names import OTHER_QUERY, RANDOM
from metaopt_lens.analysis._null_values import other_query_cosines, other_query_values, random_cosines
from metaopt_lens.analysis._output_parts import PARTS, Part
from metaopt_lens.analysis._query_batch import QueryBatch
from metaopt_lens.analysis._similarity import ZERO_UPDATE, aou_updates, cosine
from metaopt_lens.analysis._statistic import Readings, Statistic, Values
from metaopt_lens.runs import Setting

_READ: tuple[Setting, ...] = ("icl", "zs", "ft")
_NO_PART = f"{ZERO_UPDATE}, or has nothing in that part"
_WHERE: dict[Part, str] = {
    "contrast": "which label: along differences of label directions",
    "format": "any label: along their mean",
    "rest": "orthogonal to all label directions",
}
PAIRS: dict[str, Callable[[QueryBatch], Readings]] = {
    "z total": lambda batch: (batch.change("icl", "zs"), batch.change("ft", "zs")),
    "z total, position-matched": lambda batch: (
        batch.change("icl", "zs_matched"),
        batch.change("ft_matched", "zs_matched"),
    ),
    "z direct": lambda batch: (batch.parts.update, batch.change("ft", "zs")),
    "z meta-gradient": lambda batch: (batch.parts.meta_gradient, batch.change("ft", "zs")),
    "linear": lambda batch: (batch.linear, batch.matrices.linear_ft),
}


def part_name(statistic: str, part: Part) -> str:
    """What a part of a statistic is called.

    Args:
        statistic: name of the whole; ``"z total, after W_O"`` has the parts of ``"z total"``.
        part: which.
    """
    return f"{statistic.removesuffix(AFTER_W_O)}: {part}"


AFTER_W_O = ", after W_O"


def is_part(name: str) -> bool:
    """Whether a statistic is a part of another one.

    Args:
        name: of the statistic.
    """
    return name.rpartition(": ")[2] in PARTS


def head_parts(name: str) -> list[Statistic]:
    """Rows for the three parts of a pair of `PAIRS`, after W_O.

    Args:
        name: of the pair.
    """

    def row(part: Part) -> Statistic:
        def read(batch: QueryBatch) -> Readings:
            return *(batch.part(vectors, part) for vectors in PAIRS[name](batch)), *_about(batch, part)

        what = f"the same as {name}, after W_O, {part}: {_WHERE[part]}"
        outputs, called = name != "linear", part_name(name, part)
        return Statistic(
            called, what, "head", "query", _NO_PART, read, _cosine, dict(_NULLS), from_outputs=outputs, part=part
        )

    return [row(part) for part in PARTS]


def layer_parts(name: str, *, normalised: bool) -> list[Statistic]:
    """Rows for the three parts of SimAOU.

    Args:
        name: of the whole.
        normalised: whether whole outputs are scaled to unit length before the differences.
    """

    def updates(states: Readings, context: Context, partner: Tensor | None = None) -> Readings:
        """Both updates' parts; `partner`: whose finetuning update is put on each query's own baseline."""
        (icl, zs, ft), inside = states[:3], [state.double() for state in states[3:6]]
        if partner is not None:
            ft = zs + (ft - zs)[partner]
            inside[2] = inside[1] + (inside[2] - inside[1])[partner]
        known = aou_updates(icl, zs, ft, normalised=normalised, eps=context.eps, convention=context.convention)
        if normalised:
            inside = [
                own / (whole.double().norm(dim=-1, keepdim=True) + context.convention.damping)
                for own, whole in zip(inside, (icl, zs, ft), strict=True)
            ]
        pairs = zip((inside[0], inside[2]), known, strict=True)
        return tuple(torch.where(u[..., :1].isnan(), torch.nan, state - inside[1]) for state, u in pairs)

    def value(states: Readings, context: Context) -> Values:
        return cosine(*updates(states, context), convention=context.convention)

    def other_query(states: Readings, context: Context) -> Values | None:
        if len(set(states[6].tolist())) > 1:
            return None  # an update of another query is split by that query's own labels

        def met(partner: Tensor) -> Values:
            return cosine(*updates(states, context, partner), convention=context.convention)

        return other_query_values(met, len(states[0]), context.n_draws, context.generator)

    def random(states: Readings, context: Context) -> Values:
        return random_cosines(states[7][:, None, None], value(states, context), context.n_draws, context.generator)

    def row(part: Part) -> Statistic:
        def read(batch: QueryBatch) -> Readings:
            wholes, inside = [batch.hidden(s) for s in _READ], [batch.hidden_part(s, part) for s in _READ]
            return *wholes, *inside, *_about(batch, part)

        nulls = {OTHER_QUERY: other_query, RANDOM: random}
        what = f"the same as {name}, {part}: {_WHERE[part]}"
        called = part_name(name, part)
        return Statistic(called, what, "layer", "query", _NO_PART, read, value, nulls, from_outputs=True, part=part)

    return [row(part) for part in PARTS]


def _about(batch: QueryBatch, part: Part) -> Readings:
    """Of every query: a number for its label words, and the dimensions of its part."""
    assert batch.labels is not None
    groups = [zlib.crc32(repr(labels).encode()) for labels in batch.labels]
    return torch.tensor(groups), torch.tensor([batch.space.subspaces(own)[0].dims(part) for own in batch.labels])


def _cosine(pair: Readings, context: Context) -> Values:  # noqa: ARG001
    return cosine(pair[0], pair[1])


def _random(pair: Readings, context: Context) -> Values:
    dims = pair[3].clamp_min(1)[:, None, None]
    return random_cosines(dims, cosine(pair[0], pair[1]), context.n_draws, context.generator)


def _other_query(pair: Readings, context: Context) -> Values | None:  # noqa: ARG001
    """Only a query with the same label words can stand in; without any there is no such null."""
    found = other_query_cosines(pair[0], pair[1], groups=pair[2])
    return None if bool(found.isnan().all()) else found


_NULLS = {OTHER_QUERY: _other_query, RANDOM: _random}
