"""Factored low-rank matrices against the same matrices formed in full."""

import math

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens.analysis import (
    Factors,
    effective_rank,
    frobenius_cosine,
    principal_angles,
    random_factors,
    random_subspace_angles,
    singular_values,
)


def factors(seed, *heads, rows=9, columns=7, inner=4):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(*heads, rows, inner, generator=generator, dtype=torch.float64)
    return Factors(left, torch.randn(*heads, inner, columns, generator=generator, dtype=torch.float64))


def full(matrix):
    return matrix.left @ matrix.right


@pytest.mark.parametrize("inner", [1, 4, 20])
def test_frobenius_cosine_and_singular_values(inner):
    """Also with factors longer than the matrix is wide, and of different lengths."""
    a, b = factors(0, 3, 2, inner=inner), factors(1, 3, 2, inner=5)
    wanted = torch.nn.functional.cosine_similarity(full(a).flatten(-2), full(b).flatten(-2), dim=-1)
    torch.testing.assert_close(frobenius_cosine(a, b), wanted)
    torch.testing.assert_close(frobenius_cosine(a, a), torch.ones(3, 2, dtype=torch.float64))
    rank = min(inner, 7)
    torch.testing.assert_close(singular_values(a)[..., :rank], torch.linalg.svdvals(full(a))[..., :rank])


@pytest.mark.parametrize("k", [1, 3])
def test_principal_angles_equal_scipy(k):
    a, b = factors(0, 2), factors(1, 2)
    angles = principal_angles(a, b, k=k)
    for i in range(2):
        bases = [np.linalg.svd(full(m)[i].numpy()) for m in (a, b)]
        left = subspace_angles(*(u[:, :k] for u, _, _ in bases))[::-1]
        right = subspace_angles(*(vt[:k].T for _, _, vt in bases))[::-1]
        assert angles.left[i].tolist() == pytest.approx(left.tolist(), abs=1e-10)
        assert angles.right[i].tolist() == pytest.approx(right.tolist(), abs=1e-10)
    assert angles.chance == (k / 9, k / 7)
    torch.testing.assert_close(angles.overlap[:, 0], angles.left.cos().square().mean(-1))


def test_small_angles_are_accurate():
    a = factors(0)
    turned = Factors(a.left + 1e-9 * factors(5).left, a.right)
    angles = principal_angles(a, turned, k=4)
    assert 0 < angles.left.max() < 1e-7
    assert angles.right.max() < 1e-12
    assert principal_angles(a, a, k=4).left.max() < 1e-12


def test_effective_rank():
    eye = torch.eye(5, dtype=torch.float64)
    assert effective_rank(Factors(eye, eye)).item() == pytest.approx(5)
    assert effective_rank(factors(0, inner=1)).item() == pytest.approx(1)
    values = torch.linalg.svdvals(full(factors(3)))[:4]
    share = values / values.sum()
    assert effective_rank(factors(3)).item() == pytest.approx(math.exp(-(share * share.log()).sum()))
    assert effective_rank(Factors(eye * 0, eye)).isnan()
    assert frobenius_cosine(Factors(eye * 0, eye), Factors(eye, eye)).isnan()


def test_random_subspaces_overlap_by_chance():
    angles = random_subspace_angles(20, 4, n_draws=2000, seed=0)
    overlap = angles.cos().square().mean(-1)
    assert overlap.mean().item() == pytest.approx(4 / 20, abs=4 * overlap.std().item() / math.sqrt(2000))
    assert (angles.diff(dim=-1) >= 0).all()
    assert torch.equal(angles, random_subspace_angles(20, 4, n_draws=2000, seed=0))


def test_random_factors_keep_sizes_and_norm():
    a = factors(0, 6)
    draw = random_factors(a, seed=1)
    assert draw.left.shape == a.left.shape
    torch.testing.assert_close(full(draw).norm(dim=(-2, -1)), full(a).norm(dim=(-2, -1)))
    many = frobenius_cosine(factors(0, 400), random_factors(factors(0, 400), seed=2))
    assert many.mean().abs() < 4 * many.std() / 20


@pytest.fixture
def unchecked():
    """Users run without run-time shape checks: there our own messages must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_errors(unchecked):
    a = factors(0)
    with pytest.raises(OptionError, match=r"factors must multiply, with equal leading axes, got \(9, 4\) and \(5, 7\)"):
        Factors(a.left, torch.zeros(5, 7, dtype=torch.float64))
    with pytest.raises(
        OptionError, match=r"matrices of one shape are needed, got \(\) of \(9, 7\) and \(\) of \(9, 8\)"
    ):
        frobenius_cosine(a, factors(1, columns=8))
    with pytest.raises(
        UndefinedMetricError, match=r"5 leading singular directions .* second matrix has rank 4: choose"
    ):
        principal_angles(factors(1, inner=6), a, k=5)
    with pytest.raises(OptionError, match=r"a subspace of 3 dimensions has at most 3, got k=4"):
        random_subspace_angles(3, 4, n_draws=1, seed=0)
