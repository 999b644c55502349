"""What a similarity is where it can only be chance: null hypotheses that need no further runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._nulls import derangement
from metaopt_lens.analysis._similarity import unit


def random_cosines(
    dims: Int[Tensor, "#query #layer #head"],
    like: Float[Tensor, "query layer head"],
    n_draws: int,
    seed: torch.Generator,
) -> Float[Tensor, "query layer head"]:
    """Null (a): mean over draws of the cosine with a random, zero-mean, isotropic vector; NaN where `like` is.

    Whatever the other vector, that is ``g / sqrt(g^2 + c)`` with a standard normal g and c of the chi-square
    distribution with one degree of freedom less than there are dimensions.

    Args:
        dims: of the vectors' space, at least 1.
        like: the similarity itself.
        n_draws: how many are averaged.
        seed: the generator to draw from.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=seed)))
    shape = (n_draws, *like.shape)
    rest = 2 * rng.standard_gamma((dims.double().numpy() - 1) / 2 * np.ones(shape))
    first = rng.standard_normal(shape)
    mean = torch.from_numpy((first / np.sqrt(first**2 + rest)).mean(0))
    return torch.where(like.isnan(), torch.nan, mean)


def other_query_cosines(
    first: Float[Tensor, "query layer head d_head"],
    second: Float[Tensor, "query layer head d_head"],
    *,
    groups: Int[Tensor, " query"] | None = None,
    convention: Convention = Convention.DEFAULT,
) -> Float[Tensor, "query layer head"]:
    """Null (b): the mean cosine of each query's `first` with all other queries' `second`; NaN without another one.

    Exact, as a sum of cosines is one product with the sum of the unit vectors.

    Args:
        first: vectors along the last axis.
        second: as many others; NaN where undefined.
        groups: only queries of one group can stand in for each other; all of them if not given.
        convention: of the cosine.
    """
    groups = torch.zeros(len(first), dtype=torch.int64) if groups is None else groups
    others = unit(second, convention=convention)
    known = ~others.isnan().any(-1)
    others = torch.where(known[..., None], others, 0)
    found = torch.empty(first.shape[:-1], dtype=torch.float64)
    for group in sorted(set(groups.tolist())):
        members = groups == group
        own, count = others[members], known[members].double()
        rest, n = own.sum(0, keepdim=True) - own, count.sum(0, keepdim=True) - count
        found[members] = (unit(first[members], convention=convention) * rest).sum(-1) / n  # 0 / 0: there is no other
    return found


def other_query_values(
    value: Callable[[Tensor], Float[Tensor, "query layer head"]], n_queries: int, n_draws: int, seed: torch.Generator
) -> Float[Tensor, "query layer head"]:
    """Null (b) of any similarity: its mean over other queries in place of a query's own second part.

    Every query meets all others where there are no more than `n_draws`; otherwise random ones.

    Args:
        value: the similarity, given which query stands in for each.
        n_queries: how many there are.
        n_draws: how many partners are averaged.
        seed: the generator to draw from.
    """
    here = torch.arange(n_queries)
    if n_queries - 1 <= n_draws:
        partners = [here.roll(shift) for shift in range(1, n_queries)]
    else:
        partners = [derangement(n_queries, seed=seed) for _ in range(n_draws)]
    return torch.stack([value(partner) for partner in partners]).nanmean(0)
