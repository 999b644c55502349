"""Similarity of attention-output updates (SimAOU) and of attention maps (SimAM).

Dai et al. 2022 (arXiv 2212.10559), with the critique of Deutch et al. 2023 (arXiv 2311.07772).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._checks import check_finite, check_same_shape
from metaopt_lens.analysis._statistic import QueryStatistic

_TINY = 1e-20  # what the published code adds to every norm and denominator
_ZERO_UPDATE = "one of the two updates is exactly zero and has no direction"


@dataclass(frozen=True)
class SimAOU:
    """Cosine of the ICL update against the finetuning update, per query and layer.

    Attributes:
        normalised: every hidden state scaled to unit length before the differences (the published form).
        plain: differences of the hidden states as they are.
        null: what `normalised` is on average if the two updates have nothing to do with each other.
        reference: whether the published code's choices were used.
    """

    normalised: QueryStatistic
    plain: QueryStatistic
    null: QueryStatistic
    reference: bool


@dataclass(frozen=True)
class SimAM:
    """Cosine of two attention maps, per query, layer and head.

    Attributes:
        per_head: one number per query, layer and head.
        difference: whether a baseline map was subtracted from both.
        centred: whether each map's mean over the tokens was subtracted first.
        reference: whether the published code's choices were used.
    """

    per_head: QueryStatistic
    difference: bool
    centred: bool
    reference: bool

    @property
    def per_query(self) -> QueryStatistic:
        """Mean over the heads, one number per query and layer."""
        return self.per_head.over_last()


def cosine(
    first: Float[Tensor, "*item d_model"], second: Float[Tensor, "*item d_model"], *, reference: bool = False
) -> Float[Tensor, "*item"]:
    """Cosine along the last axis in float64; NaN where a vector is zero.

    ``reference=True`` adds 1e-20 to the denominator as the published code does, so a zero vector gives 0.
    """
    first, second = first.double(), second.double()
    dot = torch.einsum("...d,...d->...", first, second)
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    similarity: Tensor = dot / (norms + _TINY if reference else norms)
    return similarity


def unit(hidden: Float[Tensor, "*item d_model"], *, reference: bool = False) -> Float[Tensor, "*item d_model"]:
    """Vectors scaled to unit length, in float64: NaN for a zero vector, or 0 with ``reference=True``."""
    hidden = hidden.double()
    norm = hidden.norm(dim=-1, keepdim=True)
    scaled: Tensor = hidden / (norm + _TINY if reference else norm)
    return scaled


def sim_aou(
    icl: Float[Tensor, "query *item d_model"],
    zs: Float[Tensor, "query *item d_model"],
    ft: Float[Tensor, "query *item d_model"],
    *,
    reference: bool = False,
) -> SimAOU:
    """SimAOU from the attention outputs of the in-context, zero-shot and finetuned runs.

    Default and reference differ in one thing: ``reference=True`` adds 1e-20 to norms and denominators, so an
    update of exactly zero counts as similarity 0 and stays in the mean; by default it is undefined and left
    out. (Deutch et al. bound the norms below by 1e-12 and 1e-8, which changes only how far a near-zero update
    is damped.) The published code reports the unit-normalised form alone; here the plain form and the
    normalised form's analytic null always stand beside it.
    """
    check_same_shape(icl=icl, zs=zs, ft=ft)
    check_finite(icl=icl, zs=zs, ft=ft)
    icl, zs, ft = icl.double(), zs.double(), ft.double()
    units = [unit(h, reference=reference) for h in (icl, zs, ft)]
    normalised = cosine(units[0] - units[1], units[2] - units[1], reference=reference)
    plain = cosine(icl - zs, ft - zs, reference=reference)
    return SimAOU(
        normalised=QueryStatistic(normalised, _ZERO_UPDATE),
        plain=QueryStatistic(plain, _ZERO_UPDATE),
        null=QueryStatistic(sim_aou_null(icl, zs, ft), "a hidden state is exactly zero"),
        reference=reference,
    )


def sim_aou_null(
    icl: Float[Tensor, "query *item d_model"],
    zs: Float[Tensor, "query *item d_model"],
    ft: Float[Tensor, "query *item d_model"],
) -> Float[Tensor, " query *item"]:
    """Expected normalised SimAOU of unrelated updates: ½ sqrt((1 - cos(icl, zs)) (1 - cos(ft, zs))).

    Both unit vectors lie on one side of the sphere's point ``zs``, so their differences from it share the
    component along ``zs`` even when all else is independent. Exact when the components orthogonal to ``zs``
    are independent and isotropic. NaN where a hidden state is zero.
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
    centre: bool | None = None,
    reference: bool = False,
) -> SimAM:
    """SimAM from attention scores before the softmax, over the query's own tokens.

    ``sim_am(icl, ft)`` and ``sim_am(icl, zs)`` are the two published forms; ``sim_am(icl, ft, baseline=zs)``
    is the difference mode of the critique. With `lengths`, only the first ``lengths[i]`` entries of query i
    count and the filling behind them may be anything, NaN included.

    Default and reference differ in two things. The softmax ignores a constant added to all of a head's scores
    (a key bias adds one), the cosine of raw scores does not: by default each map's mean over the tokens is
    taken off first (``centre=True``), with ``reference=True`` it is not. And a map that is exactly zero gives
    similarity 0 in the reference (1e-20 in the denominator), but is undefined and left out by default.
    """
    check_same_shape(first=first, second=second, **({} if baseline is None else {"baseline": baseline}))
    mask = _token_mask(first, lengths)
    maps = [torch.where(mask, scores, 0) for scores in (first, second, baseline) if scores is not None]
    check_finite(**dict(zip(("first", "second", "baseline"), maps, strict=False)))
    a, b = maps[0].double(), maps[1].double()
    if baseline is not None:
        a, b = a - maps[2].double(), b - maps[2].double()
    centre = (not reference) if centre is None else centre
    if centre:
        count = mask.sum(-1, keepdim=True)
        a, b = ((x - x.sum(-1, keepdim=True) / count) * mask for x in (a, b))
        # what centring leaves of a constant map is rounding, not a direction
        a, b = (torch.where(_is_rounding(x, raw), 0, x) for x, raw in ((a, maps[0]), (b, maps[1])))
    because = "an attention map is " + ("constant" if centre else "zero") + " over the query's tokens"
    values = QueryStatistic(cosine(a, b, reference=reference), because)
    return SimAM(per_head=values, difference=baseline is not None, centred=centre, reference=reference)


def _is_rounding(centred: Tensor, raw: Tensor) -> Tensor:
    is_small: Tensor = centred.norm(dim=-1, keepdim=True) <= 1e-14 * raw.double().norm(dim=-1, keepdim=True)
    return is_small


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
