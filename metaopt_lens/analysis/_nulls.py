"""Null distributions of a similarity: against random vectors, and against another query's update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._checks import Seed, as_generator, check_finite, check_positive, check_same_shape
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._similarity import cosine

Similarity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NullDraws:
    """A similarity recomputed many times where it can only be chance.

    Attributes:
        values: one number per draw (first axis) and query, and per layer (head); NaN where undefined.
        kind: ``random`` (zero-mean Gaussian vectors), ``random uniform [0, 1)`` (the published
            baseline) or ``other query``.
    """

    values: Float[Tensor, "item query ..."]
    kind: Literal["random", "random uniform [0, 1)", "other query"]

    def means(self) -> Float[Tensor, "item ..."]:
        """Mean over the queries, one per draw."""
        return self.values.nanmean(1)

    def mean(self) -> Float[Tensor, ...]:
        """Mean over draws and queries."""
        return self.values.flatten(0, 1).nanmean(0)

    def p_value(self, observed: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """One-sided p of an observed mean over the queries: (1 + draws at least as large) / (1 + draws).

        Args:
            observed: the mean that is tested, in the shape of one draw's mean.
        """
        means = self.means()
        if observed.shape != means.shape[1:]:
            raise OptionError(
                f"observed must have the shape of one draw's mean, {tuple(means.shape[1:])}, "
                f"got {tuple(observed.shape)}: average over the queries first."
            )
        return (1 + (means >= observed).sum(0)).double() / (1 + len(means))


def random_like(
    vectors: Float[Tensor, "*item d_model"], *, seed: Seed, convention: Convention = Convention.DEFAULT
) -> Float[Tensor, "*item d_model"]:
    """Random vectors in place of the given ones, in float64.

    By default zero-mean, isotropic, and each of the norm of the vector that it replaces.

    Args:
        vectors: what is replaced, along the last axis.
        seed: or the generator to draw from.
        convention: its `random_matches` is used.
    """
    generator = as_generator(seed)
    if not convention.random_matches:
        return torch.rand(vectors.shape, generator=generator, dtype=torch.float64).to(vectors.device)
    draw = torch.randn(vectors.shape, generator=generator, dtype=torch.float64).to(vectors.device)
    matched: Tensor = draw * (vectors.double().norm(dim=-1, keepdim=True) / draw.norm(dim=-1, keepdim=True))
    return matched


def random_null(
    first: Float[Tensor, "query *item d_model"],
    second: Float[Tensor, "query *item d_model"],
    *,
    n_draws: int,
    seed: Seed,
    convention: Convention = Convention.DEFAULT,
    similarity: Similarity | None = None,
) -> NullDraws:
    """Similarity of `first` with random vectors in place of `second`.

    Args:
        first: vectors along the last axis.
        second: what is replaced.
        n_draws: how often.
        seed: or the generator to draw from.
        convention: of the cosine, and of the random vectors (see `random_like`).
        similarity: maps two such tensors to one number per query and layer; the cosine if not given.
    """
    check_same_shape(first=first, second=second)
    check_finite(first=first, second=second)
    check_positive(n_draws=n_draws)
    generator = as_generator(seed)
    similar = similarity or partial(cosine, convention=convention)
    draws = [similar(first, random_like(second, seed=generator, convention=convention)) for _ in range(n_draws)]
    return NullDraws(torch.stack(draws), "random" if convention.random_matches else "random uniform [0, 1)")


def other_query_null(
    first: Float[Tensor, "query *item d_model"],
    second: Float[Tensor, "query *item d_model"],
    *,
    n_draws: int,
    seed: Seed,
    similarity: Similarity | None = None,
) -> NullDraws:
    """Similarity of each query's `first` with another query's `second`.

    What remains is what all queries share; only the excess over it says anything about a query. Every draw is
    a derangement: no query meets itself.

    Args:
        first: vectors along the last axis.
        second: what is exchanged between queries.
        n_draws: how often.
        seed: or the generator to draw from.
        similarity: maps two such tensors to one number per query and layer; the cosine if not given.
    """
    check_same_shape(first=first, second=second)
    check_finite(first=first, second=second)
    check_positive(n_draws=n_draws)
    generator = as_generator(seed)
    similar = similarity or cosine
    draws = [similar(first, second[derangement(len(first), seed=generator)]) for _ in range(n_draws)]
    return NullDraws(torch.stack(draws), "other query")


def derangement(n: int, *, seed: Seed) -> Int[Tensor, " query"]:
    """A permutation of n things, drawn uniformly from those that leave nothing in its place.

    Args:
        n: how many things.
        seed: or the generator to draw from.
    """
    if n < 2:
        raise OptionError(f"pairing every query with another one needs at least 2 queries, got {n}: add queries.")
    generator = as_generator(seed)
    here = torch.arange(n)
    while True:  # each attempt succeeds with probability about 1/e
        order = torch.randperm(n, generator=generator)
        if not bool((order == here).any()):
            return order
