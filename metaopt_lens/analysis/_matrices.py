"""Comparison of low-rank matrices held as two factors, without ever forming them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens.analysis._checks import Seed, as_generator, check_finite, check_positive


@dataclass(frozen=True, eq=False)
class Factors:
    """Matrices ``left @ right`` (a TransformerLens ``FactoredMatrix`` gives ``Factors(m.A, m.B)``).

    The axis between the factors need not be the rank: it may be longer than the matrix is wide.
    """

    left: Float[Tensor, "*item d_model src"]
    right: Float[Tensor, "*item src d_head"]

    def __post_init__(self) -> None:
        if self.left.shape[-1] != self.right.shape[-2] or self.left.shape[:-2] != self.right.shape[:-2]:
            raise OptionError(
                "factors must multiply, with equal leading axes, got "
                f"{tuple(self.left.shape)} and {tuple(self.right.shape)}."
            )
        check_finite(left=self.left, right=self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.left.shape[-2], self.right.shape[-1]


@dataclass(frozen=True, eq=False)
class PrincipalAngles:
    """Angles in radians, ascending, between the leading singular subspaces of two matrices.

    Attributes:
        left: between the column spaces (outputs).
        right: between the row spaces (inputs).
        d_left, d_right: the dimensions of the surrounding spaces.
    """

    left: Float[Tensor, "*item rank"]
    right: Float[Tensor, "*item rank"]
    d_left: int
    d_right: int

    @property
    def overlap(self) -> Float[Tensor, "*item 2"]:
        """Mean squared cosine of the left and of the right angles: 1 for equal subspaces."""
        return torch.stack([self.left.cos().square().mean(-1), self.right.cos().square().mean(-1)], -1)

    @property
    def chance(self) -> tuple[float, float]:
        """Expected overlap of random subspaces: their dimension over that of the space."""
        k = self.left.shape[-1]
        return k / self.d_left, k / self.d_right


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular value decomposition ``left @ diag(values) @ right.mT``, thin, in float64.

    Attributes:
        left, right: singular vectors in columns.
        values: descending.
        rank: how many values are larger than rounding.
    """

    left: Float[Tensor, "*item d_model vector"]
    values: Float[Tensor, "*item rank"]
    right: Float[Tensor, "*item d_head vector"]
    rank: Int[Tensor, "*item"]

    @property
    def effective_rank(self) -> Float[Tensor, "*item"]:
        """Exponential of the entropy of the singular values divided by their sum; NaN where the matrix is zero."""
        share = self.values / self.values.sum(-1, keepdim=True)
        found: Tensor = torch.special.entr(share).sum(-1).exp()
        return found

    @property
    def norm(self) -> Float[Tensor, "*item"]:
        """Frobenius norm."""
        found: Tensor = self.values.norm(dim=-1)
        return found

    def cosine_with(self, other: Factors, *, norm: Float[Tensor, "*other"]) -> Float[Tensor, ...]:
        """Frobenius cosine with another matrix; NaN where one is zero.

        Args:
            other: as factors, along axes that broadcast.
            norm: its Frobenius norm.
        """
        inner = _inner(Factors(self.left * self.values[..., None, :], self.right.mT), other)
        return inner / (self.norm * norm)

    def leading(self, k: int) -> Spectrum:
        """The same with the first k singular vectors only; all values stay.

        Args:
            k: how many.
        """
        # Copies, so that the other vectors' memory is freed.
        return Spectrum(self.left[..., :k].clone(), self.values, self.right[..., :k].clone(), self.rank)


def spectrum(matrix: Factors) -> Spectrum:
    """Singular values and vectors of every product, through two QR factorisations of its factors.

    Args:
        matrix: one matrix, or many along leading axes.
    """
    left, values, right = _svd(matrix)
    large = values > _threshold(matrix, values) if values.numel() else torch.zeros_like(values, dtype=torch.bool)
    return Spectrum(left, values, right, large.sum(-1))


def overlap(first: Spectrum, second: Spectrum, *, k: int) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
    """Mean squared cosine of the principal angles of the k leading singular subspaces, left and right.

    The squared cosines are those of the singular values of ``A.mT @ B``, so their sum is its squared Frobenius norm.

    Args:
        first: of one matrix, or many.
        second: of as many others, along axes that broadcast.
        k: dimension of the subspaces; NaN where a rank is below it.
    """
    enough = (first.rank >= k) & (second.rank >= k)
    sides = ((first.left, second.left), (first.right, second.right))
    left, right = ((a[..., :k].mT @ b[..., :k]).square().sum((-2, -1)) / k for a, b in sides)
    return torch.where(enough, left, torch.nan), torch.where(enough, right, torch.nan)


def frobenius_cosine(first: Factors, second: Factors) -> Float[Tensor, ...]:
    """Cosine of two matrices in the Frobenius inner product, in float64; NaN where a matrix is zero.

    Args:
        first: matrices in factors.
        second: as many others.
    """
    _check_comparable(first, second)
    # reducing each matrix to its singular values first would be exact for a norm, but costs far more
    norms = (_inner(first, first).clamp_min(0) * _inner(second, second).clamp_min(0)).sqrt()
    return _inner(first, second) / norms


def dense_cosine(first: Factors, second: Float[Tensor, "*item d_model d_head"]) -> Float[Tensor, "*item"]:
    """`frobenius_cosine` with a matrix that is not in factors.

    Args:
        first: matrices in factors.
        second: as many others of their shape.
    """
    other = second.double()
    inner = (first.left.double().mT @ other * first.right.double()).sum((-2, -1))
    found: Tensor = inner / (_inner(first, first).clamp_min(0).sqrt() * other.flatten(-2).norm(dim=-1))
    return found


def singular_values(matrix: Factors) -> Float[Tensor, "*item rank"]:
    """Singular values, descending, in float64; as many as the factors allow to be non-zero.

    Args:
        matrix: in factors.
    """
    return _svd(matrix)[1]


def principal_angles(first: Factors, second: Factors, *, k: int) -> PrincipalAngles:
    """Principal angles between the spaces of the k leading singular vectors of two matrices.

    `UndefinedMetricError` if a matrix has rank below k: its k-th singular direction is arbitrary.

    Args:
        first: matrices in factors.
        second: as many others.
        k: dimension of the subspaces.
    """
    _check_comparable(first, second)
    check_positive(k=k)
    bases = []
    for name, matrix in (("first", first), ("second", second)):
        found = spectrum(matrix)
        rank = int(found.rank.min()) if found.values.numel() else 0
        if k > rank:
            raise UndefinedMetricError(
                f"{k} leading singular directions are asked for, but the {name} matrix has rank {rank}: "
                f"choose k <= {rank}."
            )
        bases.append((found.left[..., :k], found.right[..., :k]))
    (left_a, right_a), (left_b, right_b) = bases
    return PrincipalAngles(
        left=_angles(left_a, left_b),
        right=_angles(right_a, right_b),
        d_left=first.shape[0],
        d_right=first.shape[1],
    )


def effective_rank(matrix: Factors) -> Float[Tensor, ...]:
    """Exponential of the entropy of the singular values divided by their sum (Roy & Vetterli 2007).

    Between 1 and the rank; NaN where the matrix is zero.

    Args:
        matrix: in factors.
    """
    return spectrum(matrix).effective_rank


def random_factors(like: Factors, *, seed: Seed) -> Factors:
    """Gaussian factors of the same sizes, scaled so that each product keeps the given Frobenius norm.

    Args:
        like: what is imitated.
        seed: or the generator to draw from.
    """
    generator = as_generator(seed)
    left, right = (
        torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(factor.device)
        for factor in (like.left, like.right)
    )
    draw = Factors(left, right)
    scale = (_inner(like, like).clamp_min(0) / _inner(draw, draw)).sqrt()
    return Factors(left * scale[..., None, None], right)


def random_subspace_angles(d: int, k: int, *, n_draws: int, seed: Seed) -> Float[Tensor, "item rank"]:
    """Principal angles between pairs of independent, uniformly drawn k-dimensional subspaces of R^d.

    Args:
        d: dimension of the surrounding space.
        k: dimension of the subspaces.
        n_draws: pairs.
        seed: or the generator to draw from.
    """
    check_positive(d=d, k=k, n_draws=n_draws)
    if k > d:
        raise OptionError(f"a subspace of {d} dimensions has at most {d}, got k={k}: choose k <= {d}.")
    generator = as_generator(seed)
    # only the relative position matters, so one of the two may be the first k axes
    draws = torch.randn(n_draws, d, k, generator=generator, dtype=torch.float64)
    fixed = torch.eye(d, k, dtype=torch.float64).expand(n_draws, d, k)
    return _angles(fixed, torch.linalg.qr(draws).Q)


def _check_comparable(first: Factors, second: Factors) -> None:
    if first.shape != second.shape or first.left.shape[:-2] != second.left.shape[:-2]:
        raise OptionError(
            f"matrices of one shape are needed, got {tuple(first.left.shape[:-2])} of {first.shape} "
            f"and {tuple(second.left.shape[:-2])} of {second.shape}: compare the same heads."
        )


def _inner(a: Factors, b: Factors) -> Tensor:
    """Frobenius inner product: trace of (A_l A_r)ᵀ B_l B_r = sum of (A_lᵀ B_l) * (A_r B_rᵀ)."""
    left = a.left.double().mT @ b.left.double()
    right = a.right.double() @ b.right.double().mT
    return (left * right).sum((-2, -1))


def _svd(matrix: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors, singular values, right singular vectors, through QR factorisations.

    Float32 factors have fewer digits than the square roots of eigenvalues in float64: those take half the time.
    """
    q_right, r_right = torch.linalg.qr(matrix.right.double().mT)
    if matrix.left.dtype == matrix.right.dtype == torch.float32:
        reduced = matrix.left.double() @ r_right.mT  # the matrix is this times q_right.mT
        squares, vectors = (t.flip(-1) for t in torch.linalg.eigh(reduced.mT @ reduced))
        values = squares.clamp_min(0).sqrt()
        left = reduced @ vectors / values.clamp_min(torch.finfo(torch.float64).tiny)[..., None, :]
        return left, values, q_right @ vectors
    q_left, r_left = torch.linalg.qr(matrix.left.double())
    u, values, v = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return q_left @ u, values, q_right @ v.mT


def _threshold(matrix: Factors, values: Tensor) -> Tensor:
    # the usual rank tolerance, with the factors' own size: cancellation between them is rounding as well
    scale = matrix.left.double().norm(dim=(-2, -1)) * matrix.right.double().norm(dim=(-2, -1))
    eps = torch.finfo(matrix.left.dtype).eps
    return (torch.maximum(values[..., 0], scale / math.sqrt(values.shape[-1])) * eps * max(matrix.shape))[..., None]


def _angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between orthonormal bases, accurate for small angles too (Björck & Golub 1973)."""
    product = a.mT @ b
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ product).clamp(max=1).flip(-1)
    return torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin())
