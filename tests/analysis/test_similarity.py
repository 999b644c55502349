"""SimAOU, its null, and SimAM: laws and error messages."""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch

from metaopt_lens._errors import NonFiniteError, OptionError, UndefinedMetricError
from metaopt_lens.analysis import Convention, QueryStatistic, cosine, sim_am, sim_aou, sim_aou_null


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosine_is_the_textbook_one():
    a, b = randn(5, 3, 7), randn(5, 3, 7, seed=1)
    torch.testing.assert_close(cosine(a, b), torch.nn.functional.cosine_similarity(a, b, dim=-1))
    assert cosine(torch.zeros(1, 4), torch.ones(1, 4)).isnan().all()
    assert cosine(torch.zeros(1, 4), torch.ones(1, 4), convention=Convention.PUBLISHED).item() == 0


def test_sim_aou_brute_force():
    icl, zs, ft = (randn(4, 3, 6, seed=s) for s in range(3))
    result = sim_aou(icl, zs, ft)
    for i in range(4):
        for layer in range(3):
            h = [x[i, layer] for x in (icl, zs, ft)]
            u = [x / x.norm() for x in h]
            for got, (a, z, b) in ((result.plain, h), (result.normalised, u)):
                wanted = (a - z) @ (b - z) / ((a - z).norm() * (b - z).norm())
                assert got.values[i, layer].item() == pytest.approx(wanted.item(), abs=1e-12)


def test_plain_sim_aou_ignores_a_common_shift_and_scale():
    icl, zs, ft = (randn(4, 3, 6, seed=s) for s in range(3))
    shift = randn(4, 3, 6, seed=9)
    torch.testing.assert_close(
        sim_aou(icl, zs, ft).plain.values, sim_aou(2 * icl + shift, 2 * zs + shift, 2 * ft + shift).plain.values
    )


def test_float32_inputs_are_computed_in_float64():
    icl, zs, ft = (randn(4, 3, 6, seed=s).float() for s in range(3))
    wanted = sim_aou(icl.double(), zs.double(), ft.double()).normalised.values
    got = sim_aou(icl, zs, ft).normalised.values
    assert got.dtype == torch.float64
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_null_is_what_independent_updates_give(size):
    """Isotropic and independent orthogonally to zs, any component along it: ½ sqrt((1-c)(1-c'))."""
    n, d = 4000, 32
    zs = randn(n, 1, d)
    along = zs / zs.norm(dim=-1, keepdim=True)

    def away(seed, factor):
        noise = randn(n, 1, d, seed=seed)
        noise = noise - (noise * along).sum(-1, keepdim=True) * along
        return zs + 0.4 * zs + factor * noise

    result = sim_aou(away(1, size), zs, away(2, 1.0))
    null, values = result.null.mean(), result.normalised
    error = values.values.std(0) / math.sqrt(n)
    assert (values.mean() - null).abs().item() < 4 * error.item()
    if size >= 1:
        assert null.item() > 10 * error.item()  # and that is far from zero


def test_null_of_equal_noise_in_both_updates():
    """With noise of squared norm rho times the signal's the null is (1 - 1/sqrt(1 + rho)) / 2."""
    axes = torch.eye(3, dtype=torch.float64)
    for rho, wanted in ((0.1, 0.023), (1, 0.146), (3, 0.250), (10, 0.349)):
        zs = axes[:1]
        icl, ft = zs + math.sqrt(rho) * axes[1], zs + math.sqrt(rho) * axes[2]
        null = sim_aou_null(icl, zs, ft).item()
        assert null == pytest.approx((1 - 1 / math.sqrt(1 + rho)) / 2, abs=1e-12)
        assert null == pytest.approx(wanted, abs=5e-4)


def test_sim_am_by_loop_with_filling():
    lengths = torch.tensor([3, 5, 2])
    maps = [randn(3, 2, 4, 5, seed=s) for s in range(3)]
    for i, n in enumerate(lengths):
        for m in maps:
            m[i, ..., n:] = torch.nan
    uncentred = replace(Convention.DEFAULT, centres_maps=False)
    raw = sim_am(maps[0], maps[1], lengths=lengths, convention=uncentred).per_head.values
    centred = sim_am(maps[0], maps[1], lengths=lengths).per_head.values
    difference = sim_am(maps[0], maps[1], baseline=maps[2], lengths=lengths, convention=uncentred).per_head.values
    for i, n in enumerate(lengths):
        a, b, z = (m[i, 1, 2, :n] for m in maps)
        for got, x, y in ((raw, a, b), (centred, a - a.mean(), b - b.mean()), (difference, a - z, b - z)):
            wanted = (x @ y) / (x.norm() * y.norm())
            assert got[i, 1, 2].item() == pytest.approx(wanted.item(), abs=1e-12)


def test_default_sim_am_ignores_what_the_softmax_ignores():
    a, b, shift = randn(3, 2, 4, 5), randn(3, 2, 4, 5, seed=1), randn(3, 2, 4, 1, seed=2)
    torch.testing.assert_close(sim_am(a + 9 * shift, b).per_head.values, sim_am(a, b).per_head.values)
    moved, still = (sim_am(m, b, convention=Convention.PUBLISHED).per_head.values for m in (a + 9 * shift, a))
    gap = moved - still
    assert gap.abs().max() > 0.1


def test_constant_map_is_undefined_by_default_and_zero_in_the_published_code():
    a, b = randn(2, 1, 2, 4), randn(2, 1, 2, 4, seed=1)
    a[0, 0, 0] = 0.1
    default = sim_am(a, b)
    assert default.per_head.defined[:, 0].tolist() == [[False, True], [True, True]]
    torch.testing.assert_close(default.per_query.values[0, 0], default.per_head.values[0, 0, 1])
    a[0, 0, 0] = 0
    assert sim_am(a, b, convention=Convention.PUBLISHED).per_head.values[0, 0, 0] == 0
    with pytest.raises(UndefinedMetricError, match=r"1 of 4 values are undefined: an attention map is constant"):
        default.per_head.require()


@pytest.fixture
def unchecked():
    """Users run without run-time shape checks: there our own messages must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_errors(unchecked):
    a = randn(2, 1, 4)
    with pytest.raises(OptionError, match=r"one shape are needed, got icl \(2, 1, 4\), zs \(3, 1, 4\)"):
        sim_aou(a, randn(3, 1, 4), a)
    with pytest.raises(NonFiniteError, match=r"ft must be finite, but 4 of its 8 entries are NaN or infinite"):
        sim_aou(a, a, torch.stack([a[0] * torch.inf, a[1]]))
    with pytest.raises(OptionError, match=r"lengths must be between 1 and the 4 recorded tokens, got 0 to 5"):
        sim_am(a[:, :, None], a[:, :, None], lengths=torch.tensor([0, 5]))
    nothing = QueryStatistic(torch.full((2, 3), torch.nan), "nobody measured")
    with pytest.raises(UndefinedMetricError, match=r"at 3 of 3 places \(2 queries\): nobody measured"):
        nothing.mean()
