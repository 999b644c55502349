"""Similarity of attention-output updates (SimAOU) and of attention maps (SimAM).

Dai et al. 2022 (arXiv 2212.10559), with the critique of Deutch et al. 2023 (arXiv 2311.07772).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._checks import check_finite, check_same_shape
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._query_statistic import QueryStatistic

ZERO_UPDATE = "one of the two updates is zero, or not above rounding, and has no direction"
_ROUNDING = 1e3  # rounding units a difference must exceed ...
_LARGEST = 1 / 32  # ... but never more than this share of what is subtracted (half precision)


@dataclass(frozen=True, eq=False)
class SimAOU:
    """Cosine of the ICL update against the finetuning update, per query and layer.

    Attributes:
        normalised: every hidden state scaled to unit length before the differences (the published form).
        plain: differences of the hidden states as they are.
        null: what `normalised` is on average if the two updates have nothing to do with each other.
    """

    normalised: QueryStatistic
    plain: QueryStatistic
    null: QueryStatistic


@dataclass(frozen=True, eq=False)
class SimAM:
    """Cosine of two attention maps, per query, layer and head.

    Attributes:
        per_head: one number per query, layer and head.
    """

    per_head: QueryStatistic

    @property
    def per_query(self) -> QueryStatistic:
        """Mean over the heads, one number per query and layer."""
        return self.per_head.over_last()


def cosine(
    first: Float[Tensor, "*item d_model"],
    second: Float[Tensor, "*item d_model"],
    *,
    convention: Convention = Convention.DEFAULT,
) -> Float[Tensor, "*item"]:
    """Cosine along the last axis in float64; NaN where a vector is zero, unless the convention damps.

    Args:
        first: vectors along the last axis.
        second: as many others.
        convention: its `damping` is added to the product of the norms.
    """
    first, second = first.double(), second.double()
    dot = torch.einsum("...d,...d->...", first, second)
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    similarity: Tensor = dot / (norms + convention.damping)
    return similarity


def rounding_unit(dtype: torch.dtype | str) -> float:
    """Of what a model of this dtype computes: at least float32's, as hosts make rotary tables in float32.

    Args:
        dtype: or its name, such as ``"bfloat16"``.
    """
    own = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return max(torch.finfo(own).eps, torch.finfo(torch.float32).eps)


def rounding_tolerance(eps: float) -> float:
    """Size of a difference, relative to what was subtracted, up to which it counts as rounding.

    Args:
        eps: rounding unit (``torch.finfo(dtype).eps``) of the numbers as the model computed them.
    """
    return min(_ROUNDING * eps, _LARGEST)


def difference(
    first: Float[Tensor, "*item d_model"], second: Float[Tensor, "*item d_model"], *, eps: float | None = None
) -> Float[Tensor, "*item d_model"]:
    """``first - second`` in float64; NaN where it is no larger than rounding and has no direction.

    What is left of two equal vectors is rounding: its cosine with anything is a number without a meaning. A difference
    counts as undefined up to 1e3 rounding units (at most 1/32) of the norm of what was subtracted.

    Args:
        first: vectors along the last axis.
        second: what is subtracted from them.
        eps: rounding unit of the recorded numbers; by default that of `second`'s dtype.
    """
    tolerance = rounding_tolerance(torch.finfo(second.dtype).eps if eps is None else eps)
    first, second = first.double(), second.double()
    found = first - second
    large = found.norm(dim=-1, keepdim=True) > tolerance * second.norm(dim=-1, keepdim=True)
    return torch.where(large, found, torch.nan)


def unit(
    hidden: Float[Tensor, "*item d_model"], *, convention: Convention = Convention.DEFAULT
) -> Float[Tensor, "*item d_model"]:
    """Vectors scaled to unit length, in float64: NaN for a zero vector, or 0 where the convention damps.

    Args:
        hidden: vectors along the last axis.
        convention: its `damping` is added to every norm.
    """
    hidden = hidden.double()
    norm = hidden.norm(dim=-1, keepdim=True)
    scaled: Tensor = hidden / (norm + convention.damping)
    return scaled


def sim_aou(
    icl: Float[Tensor, "query *item d_model"],
    zs: Float[Tensor, "query *item d_model"],
    ft: Float[Tensor, "query *item d_model"],
    *,
    eps: float | None = None,
    convention: Convention = Convention.DEFAULT,
) -> SimAOU:
    """SimAOU from the attention outputs of the in-context, zero-shot and finetuned runs.

    An update that is zero, or rounding, is undefined by default; `Convention.PUBLISHED` counts it. (Deutch et al. bound
    the norms below by 1e-12 and 1e-8, which changes only how far a near-zero update is damped.) The published code
    reports the unit-normalised form alone; here the plain form and the normalised form's analytic null come with it.

    Args:
        icl: attention outputs of the in-context run.
        zs: of the zero-shot run, which is subtracted from both others.
        ft: of the finetuned zero-shot run.
        eps: rounding unit of the recorded numbers; by default that of `zs`'s dtype (see `difference`).
        convention: its `damping` and `ignores_rounding` are used.
    """
    normalised = cosine(
        *aou_updates(icl, zs, ft, eps=eps, normalised=True, convention=convention), convention=convention
    )
    plain = cosine(*aou_updates(icl, zs, ft, eps=eps, normalised=False, convention=convention), convention=convention)
    return SimAOU(
        normalised=QueryStatistic(normalised, ZERO_UPDATE),
        plain=QueryStatistic(plain, ZERO_UPDATE),
        null=QueryStatistic(sim_aou_null(icl, zs, ft), "a hidden state is exactly zero"),
    )


def aou_updates(
    icl: Float[Tensor, "query *item d_model"],
    zs: Float[Tensor, "query *item d_model"],
    ft: Float[Tensor, "query *item d_model"],
    *,
    normalised: bool,
    eps: float | None = None,
    convention: Convention = Convention.DEFAULT,
) -> tuple[Float[Tensor, "query *item d_model"], Float[Tensor, "query *item d_model"]]:
    """The in-context and the finetuning update that SimAOU compares, in float64; see `sim_aou` for the arguments.

    Args:
        icl: attention outputs in context.
        zs: zero-shot.
        ft: finetuned.
        normalised: scale every output to unit length before the differences (the published form).
        eps: rounding unit of the recorded numbers; by default that of `zs`'s dtype.
        convention: its `damping` and `ignores_rounding` are used.
    """
    check_same_shape(icl=icl, zs=zs, ft=ft)
    check_finite(icl=icl, zs=zs, ft=ft)
    eps = torch.finfo(zs.dtype).eps if eps is None else eps
    states = [h.double() for h in (icl, zs, ft)]
    if normalised:
        states = [unit(h, convention=convention) for h in states]
    minus = partial(difference, eps=eps) if convention.ignores_rounding else torch.sub
    return minus(states[0], states[1]), minus(states[2], states[1])


def sim_aou_null(
    icl: Float[Tensor, "query *item d_model"],
    zs: Float[Tensor, "query *item d_model"],
    ft: Float[Tensor, "query *item d_model"],
) -> Float[Tensor, " query *item"]:
    """Expected normalised SimAOU of unrelated updates: ½ sqrt((1 - cos(icl, zs)) (1 - cos(ft, zs))).

    Both unit vectors lie on one side of the sphere's point ``zs``, so their differences from it share the
    component along ``zs`` even when all else is independent. Exact when the components orthogonal to ``zs``
    are independent and isotropic. NaN where a hidden state is zero.

    Args:
        icl: attention outputs of the in-context run.
        zs: of the zero-shot run.
        ft: of the finetuned zero-shot run.
    """
    away_icl = (1 - cosine(icl, zs)).clamp_min(0)  # rounding can push a cosine above 1
    away_ft = (1 - cosine(ft, zs)).clamp_min(0)
    return 0.5 * (away_icl * away_ft).sqrt()


def sim_am(
    first: Float[Tensor, "query layer head pos"],
    second: Float[Tensor, "query layer head pos"],
    *,
    lengths: Int[Tensor, " query"] | None = None,
    baseline: Float[Tensor, "query layer head pos"] | None = None,
    eps: float | None = None,
    convention: Convention = Convention.DEFAULT,
) -> SimAM:
    """SimAM from attention scores before the softmax, over the query's own tokens.

    ``sim_am(icl, ft)`` and ``sim_am(icl, zs)`` are the two published forms; ``sim_am(icl, ft, baseline=zs)``
    is the difference mode of the critique. With `lengths`, only the first ``lengths[i]`` entries of query i
    count and the filling behind them may be anything, NaN included.

    In layer 0 of a model with relative positions the query's own scores do not depend on the demonstrations at all: the
    difference mode has nothing to compare there, and is undefined by default.

    Args:
        first: attention map of the one setting.
        second: attention map of the other.
        lengths: tokens of each query; all of them if not given.
        baseline: subtracted from both maps.
        eps: rounding unit of the recorded scores; by default that of their dtype.
        convention: its `centres_maps`, `damping` and `ignores_rounding` are used.
    """
    maps = am_maps(first, second, lengths=lengths, baseline=baseline, eps=eps, convention=convention)
    empty = "constant" if convention.centres_maps else "zero"
    because = f"an attention map is {empty} over the query's tokens, up to rounding"
    return SimAM(QueryStatistic(cosine(*maps, convention=convention), because))


def am_maps(
    first: Float[Tensor, "query layer head pos"],
    second: Float[Tensor, "query layer head pos"],
    *,
    lengths: Int[Tensor, " query"] | None = None,
    baseline: Float[Tensor, "query layer head pos"] | None = None,
    eps: float | None = None,
    convention: Convention = Convention.DEFAULT,
) -> tuple[Float[Tensor, "query layer head pos"], Float[Tensor, "query layer head pos"]]:
    """The two maps as SimAM compares them, in float64, 0 behind a query's end; see `sim_am` for the arguments.

    Args:
        first: attention map of the one setting.
        second: attention map of the other.
        lengths: tokens of each query; all of them if not given.
        baseline: subtracted from both maps.
        eps: rounding unit of the recorded scores; by default that of their dtype.
        convention: its `centres_maps` and `ignores_rounding` are used.

    Returns:
        Both maps; NaN where the subtractions leave nothing but rounding.
    """
    check_same_shape(first=first, second=second, **({} if baseline is None else {"baseline": baseline}))
    mask = _token_mask(first, lengths)
    maps = [torch.where(mask, scores, 0) for scores in (first, second, baseline) if scores is not None]
    check_finite(**dict(zip(("first", "second", "baseline"), maps, strict=False)))
    tolerance = rounding_tolerance(torch.finfo(first.dtype).eps if eps is None else eps)
    a, b, *subtracted = (m.double() for m in maps)
    count = mask.sum(-1, keepdim=True)

    def compared(raw: Tensor) -> Tensor:
        map_, size = raw, raw.norm(dim=-1, keepdim=True)
        for zero in subtracted:
            map_, size = map_ - zero, torch.maximum(size, zero.norm(dim=-1, keepdim=True))
        if convention.centres_maps:
            map_ = (map_ - map_.sum(-1, keepdim=True) / count) * mask
        if not convention.ignores_rounding or map_ is raw:
            return map_
        return torch.where(map_.norm(dim=-1, keepdim=True) > tolerance * size, map_, torch.nan)

    return compared(a), compared(b)


def _token_mask(scores: Tensor, lengths: Tensor | None) -> Tensor:
    n_tokens = scores.shape[-1]
    if lengths is None:
        lengths = torch.full((len(scores),), n_tokens)
    if bool(((lengths < 1) | (lengths > n_tokens)).any()):
        raise OptionError(
            f"lengths must be between 1 and the {n_tokens} recorded tokens, "
            f"got {int(lengths.min())} to {int(lengths.max())}."
        )
    inside = torch.arange(n_tokens, device=scores.device) < lengths.to(scores.device)[:, None]
    return inside[:, None, None, :]
