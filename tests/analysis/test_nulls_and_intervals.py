"""Random and other-query nulls, intervals and tests over demonstration sets, multiple comparisons."""

import math

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import false_discovery_control

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis import (
    Convention,
    QueryStatistic,
    adjust_p_values,
    cosine,
    derangement,
    mean_interval,
    other_query_null,
    random_like,
    random_null,
    sim_aou,
)
from metaopt_lens.analysis._interval import set_means, t_test


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_random_vectors_are_centred_and_of_the_given_norm():
    like = randn(500, 2, 8) * 3
    draw = random_like(like, seed=0)
    torch.testing.assert_close(draw.norm(dim=-1), like.norm(dim=-1))
    assert draw.mean().abs() < 4 * draw.std() / math.sqrt(draw.numel())
    published = random_like(like, seed=0, convention=Convention.PUBLISHED)
    assert published.min() >= 0
    assert published.max() < 1
    assert published.mean() == pytest.approx(0.5, abs=0.02)


def test_random_null_is_centred_but_the_published_one_is_not():
    first = randn(200, 2, 64)
    shared = first + 1.0  # updates with a common positive direction
    ours = random_null(shared, first, n_draws=5, seed=1)
    published = random_null(shared, first, n_draws=5, seed=1, convention=Convention.PUBLISHED)
    assert ours.values.shape == (5, 200, 2)
    assert ours.mean().abs().max() < 0.02
    assert published.mean().min() > 0.4
    assert (ours.kind, published.kind) == ("random", "random uniform [0, 1)")


def test_other_query_null_keeps_what_queries_share():
    common = randn(1, 3, 16)
    icl, ft = randn(300, 3, 16, seed=1) + common, randn(300, 3, 16, seed=2) + common
    null = other_query_null(icl, ft, n_draws=10, seed=0)
    torch.testing.assert_close(null.mean(), cosine(icl, ft).mean(0), atol=0.02, rtol=0)
    again = other_query_null(icl, ft, n_draws=10, seed=0)
    assert torch.equal(null.values, again.values)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(null.values, other_query_null(icl, ft, n_draws=10, seed=generator).values)


def test_derangements_leave_nothing_in_place_and_are_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = [tuple(derangement(4, seed=generator).tolist()) for _ in range(1800)]
    assert all(draw[i] != i for draw in draws for i in range(4))
    counts = [draws.count(draw) for draw in set(draws)]
    assert len(counts) == 9
    assert min(counts) > 140  # 200 expected, standard deviation 13


def test_p_value_counts_draws():
    first, second = randn(40, 2, 8), randn(40, 2, 8, seed=1)
    null = other_query_null(first, second, n_draws=99, seed=0)
    p = null.p_value(torch.tensor([2.0, -2.0], dtype=torch.float64))
    assert p.tolist() == [0.01, 1.0]


def test_other_similarities_can_be_given():
    zs, icl, ft = (randn(50, 2, 8, seed=s) for s in range(3))
    null = random_null(icl, ft, n_draws=3, seed=0, similarity=lambda a, b: sim_aou(a, zs, b).normalised.values)
    assert null.mean().min() > 0.1  # normalised SimAOU of unrelated states is not zero


RATIOS = (0.0, 1.0, 3.0)  # spread between sets over that within
REPETITIONS = 4000


def planted(n_sets, ratio, *, heads=REPETITIONS, per_set=8, seed=0, distribution=torch.randn):
    """Values of true mean 0: one effect a set, and noise for each of its queries; every column is a repetition."""
    generator = torch.Generator().manual_seed(seed)
    effect = ratio * distribution(n_sets, 1, heads, generator=generator, dtype=torch.float64)
    noise = distribution(n_sets, per_set, heads, generator=generator, dtype=torch.float64)
    values = (effect + noise).reshape(n_sets * per_set, heads)
    return values, torch.arange(n_sets).repeat_interleave(per_set)


def coverage(values, sets=None):
    found = mean_interval(values, sets=sets)
    return float(((found.low <= 0) & (found.high >= 0)).double().mean())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n_sets", [2, 3, 5, 10, 25])
def test_intervals_cover_at_their_rate_whatever_the_spread_between_sets(n_sets, ratio):
    """4,000 repetitions: standard error 0.34 %, so that a coverage of 95 % stays within 93.6 and 96.4 % (4 errors)."""
    assert 0.936 <= coverage(*planted(n_sets, ratio)) <= 0.964


@pytest.mark.parametrize("n_sets", [5, 10, 25])
def test_intervals_cover_for_accuracies_too(n_sets):
    """Shares of right answers of eight queries, with sets of different difficulty: not normal, but averaged."""
    generator = torch.Generator().manual_seed(1)
    share = 0.3 + 0.4 * torch.rand(n_sets, 1, REPETITIONS, generator=generator, dtype=torch.float64)
    right = (torch.rand(n_sets, 8, REPETITIONS, generator=generator, dtype=torch.float64) < share).double() - 0.5
    sets = torch.arange(n_sets).repeat_interleave(8)
    assert 0.93 <= coverage(right.reshape(n_sets * 8, -1), sets) <= 0.97


@pytest.mark.parametrize("per_set", [2, 3, 8])
def test_intervals_of_one_set_cover_the_mean_behind_these_demonstrations(per_set):
    """Of the set's own mean, not of the mean over sets: hence their label."""
    assert 0.936 <= coverage(planted(1, 0.0, per_set=per_set)[0]) <= 0.964
    values, _ = planted(1, 3.0, per_set=per_set)
    assert coverage(values) < 0.85
    assert mean_interval(values).label == "conditional on these demonstrations"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n_sets", [3, 5, 10, 25])
def test_counts_of_heads_find_nothing_where_there_is_nothing(n_sets, ratio):
    """Benjamini-Hochberg over 18 heads bounds the chance of any call by 5 % where every head is null."""
    trials, heads = 2000, 18
    values, sets = planted(n_sets, ratio, heads=trials * heads, seed=2)
    p = t_test(set_means(values, sets)).reshape(trials, heads)
    called = torch.stack([(adjust_p_values(row) < 0.05).any() for row in p]).double().mean()
    assert called <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / trials)
    assert p.numel() == trials * heads
    assert float((p < 0.05).double().mean()) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / p.numel()))


def test_a_true_effect_is_found():
    values, sets = planted(10, 1.0, heads=18, seed=3)
    p = adjust_p_values(t_test(set_means(values + 3, sets)))
    assert bool((p < 0.05).all())


def test_interval_of_unrelated_updates_covers_zero_at_its_rate():
    """Plain similarity of independent zero-mean updates: true mean 0, so 95 % intervals hold 0 in 95 %."""
    samples = 1200
    zs = randn(60, samples, 12)
    icl, ft = zs + randn(*zs.shape, seed=1), zs + randn(*zs.shape, seed=2)
    found = sim_aou(icl, zs, ft)
    assert coverage(found.plain.values) == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / samples))
    assert coverage(found.normalised.values) < 0.1


def test_interval_is_students_on_the_sets_means():
    values, sets = planted(4, 1.0, heads=3, seed=5)
    values[:3, 1] = torch.nan  # part of a set
    values[8:16, 2] = torch.nan  # a whole set
    found = mean_interval(values, sets=sets, level=0.9)
    for column in range(3):
        means = [float(part.nanmean()) for part in values[:, column].split(8)]
        means = [m for m in means if not math.isnan(m)]
        low, high = stats.t.interval(0.9, len(means) - 1, np.mean(means), stats.sem(means))
        assert float(found.estimate[column]) == pytest.approx(np.mean(means))
        assert (float(found.low[column]), float(found.high[column])) == pytest.approx((low, high))
        assert int(found.n_defined[column]) == len(means)
    p = t_test(set_means(values, sets))
    means = [float(part.nanmean()) for part in values[:, 1].split(8)]
    assert float(p[1]) == pytest.approx(stats.ttest_1samp(means, 0).pvalue)


def test_interval_fields():
    values = torch.tensor([[0.0, 1], [2, torch.nan], [4, 3], [10, 10]]).double()
    single = mean_interval(values)
    assert (single.label, single.unit, single.n_sets) == ("conditional on these demonstrations", "query", 1)
    assert single.estimate.tolist() == pytest.approx([4, 14 / 3])
    assert single.n_defined.tolist() == [4, 3]
    two = mean_interval(QueryStatistic(values, "x"), sets=torch.tensor([7, 7, 7, 9]), level=0.9)
    assert (two.label, two.unit) == ("over 2 demonstration sets", "set")
    assert two.estimate.tolist() == pytest.approx([6, 6])  # mean of the sets' means
    assert (two.n_sets, two.n_queries, two.level) == (2, 4, 0.9)


def test_where_there_is_no_interval_it_says_so():
    """Equal values, a single value, no value: never an interval of width 0, never a p value."""
    nan = torch.nan
    values = torch.tensor([[0.1, 0.3, nan, 0.1], [0.1, nan, nan, 0.2], [0.1, nan, nan, 0.3]]).double()
    for sets in (None, torch.arange(3)):
        found = mean_interval(values, sets=sets)
        assert found.low.isnan().tolist() == found.high.isnan().tolist() == [True, True, True, False]
        assert found.degenerate.tolist() == [True, True, False, False]
        assert found.estimate.isnan().tolist() == [False, False, True, False]
        assert t_test(values).isnan().tolist() == [True, True, True, False]
    assert t_test(torch.tensor([[0.1], [0.3]]).double()).isnan().all()  # two sets are too few


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
    with pytest.raises(OptionError, match=r"pairing every query with another one needs at least 2 queries, got 1"):
        other_query_null(x[:1], x[:1], n_draws=1, seed=0)
    with pytest.raises(OptionError, match=r"n_draws must be at least 1, got 0"):
        random_null(x, x, n_draws=0, seed=0)
    with pytest.raises(OptionError, match=r"shape of one draw's mean, \(\), got \(2,\)"):
        random_null(x, x, n_draws=1, seed=0).p_value(torch.zeros(2))
    with pytest.raises(OptionError, match=r"level must lie between 0 and 1, got 95"):
        mean_interval(x, level=95)
    with pytest.raises(OptionError, match=r"sets must name a demonstration set for each of the 3 queries, got 2"):
        mean_interval(x, sets=torch.arange(2))
    with pytest.raises(OptionError, match=r"p values must lie between 0 and 1"):
        adjust_p_values(torch.tensor([0.5, torch.nan]))


def test_an_interval_of_accuracies_ends_where_accuracies_end() -> None:
    gains = torch.tensor([1.0, 1.0, 1.0, 0.0])
    whole = mean_interval(gains)
    assert float(whole.high) > 1
    cut = whole.within(-1.0, 1.0)
    assert float(cut.high) == 1
    assert float(cut.low) == float(whole.low)
    assert float(cut.estimate) == 0.75
    assert mean_interval(torch.ones(3)).within(-1.0, 1.0).degenerate
