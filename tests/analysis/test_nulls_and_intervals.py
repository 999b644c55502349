"""Random and shuffled nulls, the hierarchical bootstrap and multiple comparisons."""

import math

import jaxtyping
import pytest
import torch
from scipy.stats import false_discovery_control

from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens.analysis import (
    QueryStatistic,
    adjust_p_values,
    cosine,
    derangement,
    hierarchical_bootstrap,
    random_like,
    random_null,
    shuffled_null,
    sim_aou,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_random_vectors_are_centred_and_of_the_given_norm():
    like = randn(500, 2, 8) * 3
    draw = random_like(like, seed=0)
    torch.testing.assert_close(draw.norm(dim=-1), like.norm(dim=-1))
    assert draw.mean().abs() < 4 * draw.std() / math.sqrt(draw.numel())
    published = random_like(like, seed=0, reference=True)
    assert published.min() >= 0
    assert published.max() < 1
    assert published.mean() == pytest.approx(0.5, abs=0.02)


def test_random_null_is_centred_but_the_published_one_is_not():
    first = randn(200, 2, 64)
    shared = first + 1.0  # updates with a common positive direction
    ours = random_null(shared, first, n_draws=5, seed=1)
    published = random_null(shared, first, n_draws=5, seed=1, reference=True)
    assert ours.values.shape == (5, 200, 2)
    assert ours.mean().abs().max() < 0.02
    assert published.mean().min() > 0.4
    assert (ours.kind, published.kind) == ("random", "random uniform [0, 1)")


def test_shuffled_null_keeps_what_queries_share():
    common = randn(1, 3, 16)
    icl, ft = randn(300, 3, 16, seed=1) + common, randn(300, 3, 16, seed=2) + common
    null = shuffled_null(icl, ft, n_draws=10, seed=0)
    torch.testing.assert_close(null.mean(), cosine(icl, ft).mean(0), atol=0.02, rtol=0)
    again = shuffled_null(icl, ft, n_draws=10, seed=0)
    assert torch.equal(null.values, again.values)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(null.values, shuffled_null(icl, ft, n_draws=10, seed=generator).values)


def test_derangements_leave_nothing_in_place_and_are_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = [tuple(derangement(4, seed=generator).tolist()) for _ in range(1800)]
    assert all(draw[i] != i for draw in draws for i in range(4))
    counts = [draws.count(draw) for draw in set(draws)]
    assert len(counts) == 9
    assert min(counts) > 140  # 200 expected, standard deviation 13


def test_p_value_counts_draws():
    first, second = randn(40, 2, 8), randn(40, 2, 8, seed=1)
    null = shuffled_null(first, second, n_draws=99, seed=0)
    p = null.p_value(torch.tensor([2.0, -2.0], dtype=torch.float64))
    assert p.tolist() == [0.01, 1.0]


def test_other_similarities_can_be_given():
    zs, icl, ft = (randn(50, 2, 8, seed=s) for s in range(3))
    null = random_null(icl, ft, n_draws=3, seed=0, similarity=lambda a, b: sim_aou(a, zs, b).normalised.values)
    assert null.mean().min() > 0.1  # normalised SimAOU of unrelated states is not zero


def coverage(values, **options):
    hits = 0
    for seed, sample in enumerate(values):
        interval = hierarchical_bootstrap(sample, n_resamples=400, seed=seed, **options)
        hits += ((interval.low <= 0) & (interval.high >= 0)).double().mean().item()
    return hits / len(values)


def test_interval_of_unrelated_updates_covers_zero_at_its_rate():
    """Plain similarity of independent zero-mean updates: true mean 0, so 95 % intervals hold 0 in 95 %."""
    samples, layers = 150, 8
    zs = randn(samples, 60, layers, 12)
    icl, ft = zs + randn(*zs.shape, seed=1), zs + randn(*zs.shape, seed=2)
    plain = [sim_aou(icl[i], zs[i], ft[i]).plain for i in range(samples)]
    assert coverage(plain) == pytest.approx(0.945, abs=4 * math.sqrt(0.05 * 0.95 / (samples * layers)))
    normalised = [sim_aou(icl[i], zs[i], ft[i]).normalised for i in range(samples)]
    assert coverage(normalised) < 0.1


def test_hierarchical_interval_covers_where_the_flat_one_does_not():
    """Sets differ: an interval that only resamples queries is too narrow."""
    n_sets, per_set, samples = 20, 10, 250
    generator = torch.Generator().manual_seed(3)
    effect = torch.randn(samples, n_sets, 1, generator=generator).expand(-1, -1, per_set)
    values = (effect + torch.randn(samples, n_sets, per_set, generator=generator)).reshape(samples, -1).double()
    sets = torch.arange(n_sets).repeat_interleave(per_set)
    assert coverage(values, sets=sets) == pytest.approx(0.94, abs=0.05)
    assert coverage(values) < 0.75


def test_interval_fields():
    values = torch.tensor([[0.0, 1], [2, torch.nan], [4, 3], [10, 10]]).double()
    single = hierarchical_bootstrap(values, seed=0)
    assert single.label == "conditional on these demonstrations"
    assert single.estimate.tolist() == pytest.approx([4, 14 / 3])
    assert (single.low <= single.estimate).all()
    assert (single.estimate <= single.high).all()
    two = hierarchical_bootstrap(QueryStatistic(values, "x"), sets=torch.tensor([7, 7, 7, 9]), seed=0, level=0.9)
    assert two.label == "over 2 demonstration sets and their queries"
    assert two.estimate.tolist() == pytest.approx([6, 6])  # mean of the sets' means
    assert (two.n_sets, two.n_queries, two.level) == (2, 4, 0.9)
    again = hierarchical_bootstrap(values, seed=torch.Generator().manual_seed(0))
    assert torch.equal(single.low, again.low)


def test_adjusted_p_values():
    p = torch.tensor([[0.01, 0.04], [0.03, 0.005]], dtype=torch.float64)
    wanted = false_discovery_control(p.flatten().numpy()).reshape(2, 2)
    torch.testing.assert_close(adjust_p_values(p), torch.from_numpy(wanted))
    holm = adjust_p_values(p, method="holm")
    torch.testing.assert_close(holm, torch.tensor([[0.03, 0.06], [0.06, 0.02]], dtype=torch.float64))
    assert adjust_p_values(torch.ones(3, dtype=torch.float64), method="holm").tolist() == [1, 1, 1]


@pytest.fixture
def unchecked():
    """Users run without run-time shape checks: there our own messages must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_errors(unchecked):
    x = randn(3, 4)
    with pytest.raises(OptionError, match=r"a shuffle that moves every query needs at least 2 queries, got 1"):
        shuffled_null(x[:1], x[:1], n_draws=1, seed=0)
    with pytest.raises(OptionError, match=r"n_draws must be at least 1, got 0"):
        random_null(x, x, n_draws=0, seed=0)
    with pytest.raises(OptionError, match=r"shape of one draw's mean, \(\), got \(2,\)"):
        random_null(x, x, n_draws=1, seed=0).p_value(torch.zeros(2))
    with pytest.raises(OptionError, match=r"level must lie between 0 and 1, got 95"):
        hierarchical_bootstrap(x, seed=0, level=95)
    with pytest.raises(UndefinedMetricError, match=r"demonstration set 0 has no defined value at some layer"):
        hierarchical_bootstrap(x * torch.nan, seed=0)
    with pytest.raises(OptionError, match=r"p values must lie between 0 and 1"):
        adjust_p_values(torch.tensor([0.5, torch.nan]))
