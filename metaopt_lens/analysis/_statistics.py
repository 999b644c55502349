"""STATISTICS, the table of everything that a comparison measures (docs/theory.md, section 4).

A new statistic is a row; a new null of one is an entry in its `nulls` (and a line in `NULLS`, for what it asks).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis._measuring import Context
from metaopt_lens.analysis._null_names import ANALYTIC, CHANCE, OTHER_QUERY, RANDOM, RANDOM_ROTATION
from metaopt_lens.analysis._null_values import other_query_cosines, other_query_values, random_cosines
from metaopt_lens.analysis._pairs import PAIRS, head_parts, layer_parts
from metaopt_lens.analysis._query_batch import QueryBatch
from metaopt_lens.analysis._rank import kendall_tau
from metaopt_lens.analysis._recall import topk_recall
from metaopt_lens.analysis._similarity import ZERO_UPDATE, am_maps, aou_updates, cosine, sim_aou_null
from metaopt_lens.analysis._statistic import Readings, Statistic, Values
from metaopt_lens.runs import Setting

_MATRIX = "one of the two matrices is zero, or finetuning changed no more than rounding"
_RANK = "one of the two matrices has a rank below the dimension of the subspaces"
_RANKING = "all entries are tied, or there are fewer than two"
_TRAINING_DRAWS = 4  # rankings are slow: one draw in so many


# ---- cosines of two updates -----------------------------------------------------------------------------------------


def _of_heads(
    name: str,
    description: str,
    pair: Callable[[QueryBatch], Readings],
    dims: Callable[[Context, Tensor], int] = lambda context, vectors: vectors.shape[-1],  # noqa: ARG005
) -> Statistic:
    """A row for the cosine of two vectors of every head, in a space of `dims` dimensions."""

    def value(pair: Readings, context: Context) -> Values:  # noqa: ARG001
        return cosine(*pair)

    def random(pair: Readings, context: Context) -> Values:
        size = torch.tensor(dims(context, pair[0])).reshape(1, 1, 1)
        return random_cosines(size, cosine(*pair), context.n_draws, context.generator)

    def other_query(pair: Readings, context: Context) -> Values:  # noqa: ARG001
        return other_query_cosines(*pair)

    nulls = {OTHER_QUERY: other_query, RANDOM: random}
    outputs = not name.startswith("linear")
    return Statistic(name, description, "head", "query", ZERO_UPDATE, pair, value, nulls, from_outputs=outputs)


def _in_the_stream(batch: QueryBatch) -> Readings:
    return tuple(batch.space.coordinates(z) for z in PAIRS["z total"](batch))


# ---- the matrices ---------------------------------------------------------------------------------------------------


def _subspaces(side: str) -> Statistic:
    return Statistic(
        f"subspaces {side}",
        "mean squared cosine of the principal angles between the leading singular subspaces of dW_ICL and dW_FT, "
        f"{'output' if side == 'left' else 'input'} side, k = {{subspace_dim}}",
        "head",
        "set",
        _RANK,
        lambda batch: (getattr(batch.matrices, side),),
        lambda found, _: found[0],
        {RANDOM_ROTATION: lambda found, _: found[1]},
        read_for_nulls=lambda batch: batch.rotated_overlaps[("left", "right").index(side) :][:1],
    )


# ---- the published metrics of attention outputs and maps ------------------------------------------------------------


def _outputs(batch: QueryBatch) -> Readings:
    return batch.hidden("icl"), batch.hidden("zs"), batch.hidden("ft")


def _sim_aou(states: Readings, context: Context) -> Values:
    updates = aou_updates(*states, normalised=True, eps=context.eps, convention=context.convention)
    return cosine(*updates, convention=context.convention)


def _sim_aou_other_query(states: Readings, context: Context) -> Values:
    """Another query's update, put on the query's own baseline before everything is normalised."""
    icl, zs, ft = states

    def value(partner: Tensor) -> Values:
        return _sim_aou((icl, zs, zs + (ft - zs)[partner]), context)

    return other_query_values(value, len(icl), context.n_draws, context.generator)


def _plain_updates(states: Readings, context: Context) -> Readings:
    return aou_updates(*states, normalised=False, eps=context.eps, convention=context.convention)


def _plain(states: Readings, context: Context) -> Values:
    return cosine(*_plain_updates(states, context), convention=context.convention)


def _plain_other_query(states: Readings, context: Context) -> Values:
    return other_query_cosines(*_plain_updates(states, context), convention=context.convention)


def _plain_random(states: Readings, context: Context) -> Values:
    size = torch.full((1, 1, 1), states[0].shape[-1])
    return random_cosines(size, _plain(states, context), context.n_draws, context.generator)


def _sim_am(name: str, description: str, second: Setting, baseline: Setting | None = None) -> Statistic:
    """A row for the similarity of the in-context attention map with another one, mean over heads."""

    def read(batch: QueryBatch) -> Readings:
        maps = am_maps(
            batch.scores("icl"),
            batch.scores(second),
            baseline=None if baseline is None else batch.scores(baseline),
            lengths=batch.lengths,
            eps=batch.eps,
            convention=batch.context.convention,
        )
        return *maps, batch.lengths

    return Statistic(name, description, "layer", "query", "an attention map is constant up to rounding", read, _am, _AM)


def _am_per_head(maps: Readings, context: Context) -> Values:
    return cosine(maps[0], maps[1], convention=context.convention)


def _am(maps: Readings, context: Context) -> Values:
    return _am_per_head(maps, context).nanmean(-1, keepdim=True)


def _am_random(maps: Readings, context: Context) -> Values:
    """A random map over the query's tokens; centring takes one dimension away."""
    dims = (maps[2] - int(context.convention.centres_maps)).clamp_min(1)[:, None, None]
    drawn = random_cosines(dims, _am_per_head(maps, context), context.n_draws, context.generator)
    return drawn.nanmean(-1, keepdim=True)


def _am_other_query(maps: Readings, context: Context) -> Values | None:
    """Only a query of the same length can stand in; one that has none is left out."""
    first, second, lengths = maps
    moved = other_query_cosines(first, second, groups=lengths, convention=context.convention)
    return None if bool(moved.isnan().all()) else moved.nanmean(-1, keepdim=True)


_AM = {OTHER_QUERY: _am_other_query, RANDOM: _am_random}


# ---- attention to training tokens -----------------------------------------------------------------------------------

_Ranked = Callable[[Tensor, Tensor, Context], Float[Tensor, "query layer"]]


def _trained(
    name: str, description: str, level: str, similarity: _Ranked, chance: Callable[[Context, int], float]
) -> Statistic:
    """A row that compares the attention to the demonstrations in context and in finetuning, by rank."""

    def read(batch: QueryBatch) -> Readings:
        maps = batch.training_attention
        return (maps.icl_token, maps.ft_token) if level == "token" else (maps.icl_example, maps.ft_example)

    def value(maps: Readings, context: Context) -> Values:
        icl, ft = maps
        return similarity(icl, ft, context)[..., None]

    def other_query(maps: Readings, context: Context) -> Values:
        icl, ft = maps
        draws = max(1, context.n_draws // _TRAINING_DRAWS)
        return other_query_values(lambda who: value((icl, ft[who]), context), len(icl), draws, context.generator)

    def by_chance(maps: Readings, context: Context) -> Values:
        return torch.full((*maps[0].shape[:-1], 1), chance(context, maps[0].shape[-1]))

    nulls = {OTHER_QUERY: other_query, CHANCE: by_chance}
    return Statistic(name, description, "layer", "query", _RANKING, read, value, nulls, needs_factors=True)


def _tau(first: Tensor, second: Tensor, context: Context) -> Tensor:  # noqa: ARG001
    return kendall_tau(first, second).values


def _recall(level: str, first: Tensor, second: Tensor, context: Context) -> Tensor:
    return topk_recall(first, second, k=context.top_k[level], convention=context.convention).per_query.values


def _kendall(level: str) -> Statistic:
    words = "rank correlation of the attention to the demonstrations in context and in finetuning"
    return _trained(f"Kendall, {level} level", words, level, _tau, lambda context, n: 0.0)  # noqa: ARG005


def _top_k(level: str) -> Statistic:
    k = f"{{{level}}}"
    words = f"share of the {k} most attended in finetuning that are among the {k} most attended in context"
    return _trained(
        f"top-{k} recall, {level} level",
        words,
        level,
        partial(_recall, level),
        lambda context, n: context.top_k[level] / n,
    )


# ---- the table ------------------------------------------------------------------------------------------------------

_MAPS = "scores before the softmax over the query's tokens"

STATISTICS: tuple[Statistic, ...] = (
    _of_heads(
        "z total",
        "z^ICL - z^ZS against z^FT - z^ZS, in d_head",
        PAIRS["z total"],
    ),
    _of_heads(
        "z total, after W_O", "the same in the residual stream", _in_the_stream, lambda context, _: context.d_model
    ),
    _of_heads(
        "z total, position-matched",
        "z^ICL - z^ZSm against z^FTm - z^ZSm (zero-shot runs at in-context positions), in d_head",
        PAIRS["z total, position-matched"],
    ),
    _of_heads(
        "z direct",
        "z^ICL - z_without against z^FT - z^ZS, in d_head",
        PAIRS["z direct"],
    ),
    _of_heads(
        "z meta-gradient",
        "sum_D a v against z^FT - z^ZS, in d_head",
        PAIRS["z meta-gradient"],
    ),
    _of_heads(
        "linear",
        "dW_ICL q against dW_FT q (first-order in depth), in d_head",
        PAIRS["linear"],
    ),
    _of_heads(
        "linear, keys for queries",
        "the same with the query token's key in the place of its query: dW_ICL k against dW_FT k (arXiv:2602.21204)",
        lambda batch: batch.read_with_keys,
    ),
    Statistic(
        "matrices",
        "Frobenius cosine of dW_ICL and dW_FT",
        "head",
        "set",
        _MATRIX,
        lambda batch: (batch.matrices.frobenius,),
        lambda found, _: found[0],
        {RANDOM: lambda found, _: torch.zeros_like(found[0])},  # the expectation, with a random matrix
    ),
    _subspaces("left"),
    _subspaces("right"),
    Statistic(
        "SimAOU",
        "attention outputs after W_O, each normalised to unit length before the differences (the published form)",
        "layer",
        "query",
        ZERO_UPDATE,
        _outputs,
        _sim_aou,
        {ANALYTIC: lambda states, _: sim_aou_null(*states), OTHER_QUERY: _sim_aou_other_query},
        from_outputs=True,
    ),
    Statistic(
        "SimAOU unnormalised",
        "attention outputs after W_O",
        "layer",
        "query",
        ZERO_UPDATE,
        _outputs,
        _plain,
        {OTHER_QUERY: _plain_other_query, RANDOM: _plain_random},
        from_outputs=True,
    ),
    _sim_am("SimAM ICL-FT", f"{_MAPS}, maps, mean over heads", "ft"),
    _sim_am("SimAM ICL-ZS", f"{_MAPS}, maps, mean over heads", "zs"),
    _sim_am("SimAM difference", f"{_MAPS}, difference mode (both minus zero-shot), mean over heads", "ft", "zs"),
    *(row for name in PAIRS for row in head_parts(name)),
    *layer_parts("SimAOU", normalised=True),
    *layer_parts("SimAOU unnormalised", normalised=False),
    _kendall("token"),
    _top_k("token"),
    _kendall("example"),
    _top_k("example"),
)


def statistic(name: str) -> Statistic:
    """The row of that name.

    Args:
        name: as it stands in the table.
    """
    return next(row for row in STATISTICS if row.name == name)
