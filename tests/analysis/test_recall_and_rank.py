"""Rec2FTP, top-k recall, Kendall's tau-b and the training attention: oracles, ties, error messages."""

import math

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from metaopt_lens._errors import NonFiniteError, OptionError, UndefinedMetricError
from metaopt_lens.analysis import (
    Convention,
    context_columns,
    finetuning_scores,
    kendall_tau,
    rec2ftp,
    topk_recall,
    training_attention,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rec2ftp_with_its_base_rate():
    zs = torch.tensor([False, False, False, False, True])
    icl = torch.tensor([True, False, True, True, True])
    ft = torch.tensor([True, True, False, True, True])
    result = rec2ftp(zs, icl, ft)
    assert (result.both, result.ft, result.icl, result.zs_wrong, result.n_queries) == (2, 3, 3, 4, 5)
    assert result.value == pytest.approx(200 / 3)
    assert result.base_rate == 75.0
    assert result.undefined is None


def test_rec2ftp_undefined_is_neither_zero_nor_nan():
    wrong, right = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    result = rec2ftp(wrong, right, wrong)
    assert result.value is None
    assert result.base_rate == 100
    assert result.undefined == "finetuning corrected none of the 3 queries that were wrong zero-shot"
    with pytest.raises(UndefinedMetricError, match=r"Rec2FTP is undefined: finetuning corrected none .*3 queries"):
        result.require()
    assert rec2ftp(right, right, right).base_rate is None


@pytest.mark.parametrize(("values", "n"), [(None, 2), (None, 33), (3, 50), (40, 257), (2, 3), (5, 1000)])
def test_kendall_equals_scipy(values, n):
    """Without ties (None) and with few distinct values."""
    shape = (4, 3, n)
    if values is None:
        x, y = (torch.randn(shape, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    else:
        x = torch.randint(values, shape, generator=generator(1)).double()
        y = torch.randint(values + 1, shape, generator=generator(2)).double()
    y[0] = x[0]
    y[1] = -x[1]
    got = kendall_tau(x, y)
    for i in range(4):
        for j in range(3):
            wanted = kendalltau(x[i, j], y[i, j]).statistic
            if math.isnan(wanted):
                assert not got.defined[i, j]
            else:
                assert got.values[i, j].item() == pytest.approx(wanted, abs=1e-12)


def test_kendall_by_counting_pairs():
    x, y = (torch.randint(4, (1, 30), generator=generator(s)).double() for s in (3, 4))
    a, b = ((v[0][:, None] - v[0][None]).sign() for v in (x, y))
    wanted = (a * b).sum() / math.sqrt(float((a**2).sum() * (b**2).sum()))
    assert kendall_tau(x, y).values.item() == pytest.approx(wanted.item(), abs=1e-12)


def test_kendall_over_more_rows_than_one_chunk():
    x, y = (torch.randn(700, 500, generator=generator(s)) for s in (1, 2))
    got = kendall_tau(x, y).values
    for i in (0, 523, 524, 699):  # around the chunk's end
        assert got[i].item() == pytest.approx(kendalltau(x[i], y[i]).statistic, abs=1e-12)


def test_kendall_undefined():
    result = kendall_tau(torch.tensor([[1.0, 1, 1], [1, 2, 3]]), torch.tensor([[1.0, 2, 3], [1, 3, 2]]))
    assert result.defined.tolist() == [False, True]
    assert result.mean().item() == pytest.approx(1 / 3)
    assert not kendall_tau(torch.ones(2, 1), torch.ones(2, 1)).defined.any()
    with pytest.raises(UndefinedMetricError, match=r"a vector is constant \(all entries tied\)"):
        result.require()


def test_topk_recall_by_sets():
    x, y = (torch.randn(6, 2, 40, generator=generator(s)) for s in (1, 2))
    for convention in (Convention.PUBLISHED, Convention.DEFAULT):
        got = topk_recall(x, y, k=7, convention=convention).per_query.values
        for i in range(6):
            for j in range(2):
                top = [set(np.argsort(-v[i, j].numpy())[:7].tolist()) for v in (x, y)]
                assert got[i, j].item() == pytest.approx(len(top[0] & top[1]) / 7)


def test_topk_recall_with_ties_does_not_depend_on_their_order():
    """Three entries share the last place of the first vector: each is in the top with probability 1/3."""
    x = torch.tensor([[5.0, 1, 1, 1, 0]])
    y = torch.tensor([[5.0, 4, 0, 0, 0]])
    result = topk_recall(x, y, k=2)
    assert result.per_query.values.item() == pytest.approx((1 + 1 / 3) / 2)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert topk_recall(x[:, order], y[:, order], k=2).per_query.values.item() == pytest.approx(2 / 3)
    assert topk_recall(x, y, k=2, convention=Convention.PUBLISHED).per_query.values.item() in (0.5, 1.0)


def test_chance_is_what_random_vectors_give():
    x, y = (torch.randn(4000, 30, generator=generator(s)) for s in (1, 2))
    result = topk_recall(x, y, k=6)
    assert result.chance == 0.2
    values = result.per_query.values
    assert abs(values.mean().item() - 0.2) < 4 * values.std().item() / math.sqrt(4000)


def test_training_attention_levels():
    scores = (
        torch.randn(2, 3, 6, generator=generator(1)).double(),
        torch.randn(2, 3, 6, generator=generator(2)).double(),
    )
    lengths = torch.tensor([1, 3, 2])
    weights, logs = (
        training_attention(*scores, lengths, convention=c) for c in (Convention.PUBLISHED, Convention.DEFAULT)
    )
    assert logs.logarithmic
    torch.testing.assert_close(weights.icl_token.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(weights.icl_example[..., 1], weights.icl_token[..., 1:4].sum(-1))
    torch.testing.assert_close(logs.ft_token.exp(), weights.ft_token)
    torch.testing.assert_close(logs.ft_example.exp(), weights.ft_example)


def test_underflow_makes_ties_only_in_the_published_weights():
    scores = torch.tensor([[[0.0, -800, -900, -1000]]])
    lengths = torch.tensor([1, 1, 1, 1])
    taus = [
        kendall_tau(maps.icl_example, maps.ft_example).values.item()
        for maps in (
            training_attention(scores, scores / 10, lengths, convention=c)
            for c in (Convention.PUBLISHED, Convention.DEFAULT)
        )
    ]
    assert taus[1] == 1
    assert taus[0] == pytest.approx(math.sqrt(0.5))  # three of the four weights are exactly 0 and tied


def test_finetuning_scores_and_context_columns():
    demos, queries = torch.randn(5, 2, 4, generator=generator(1)), torch.randn(3, 2, 4, generator=generator(2))
    wanted = torch.einsum("tld,qld->qlt", demos.double(), queries.double())
    torch.testing.assert_close(finetuning_scores(demos, queries), wanted)
    # BOS, 2 tokens, separator, 1 token, separator
    assert context_columns(torch.tensor([2, 1])).tolist() == [1, 2, 4]


@pytest.fixture
def unchecked():
    """Users run without run-time shape checks: there our own messages must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_errors(unchecked):
    x = torch.randn(2, 4, generator=generator())
    with pytest.raises(
        OptionError, match=r"top-5 recall needs at least 5 entries, but there are only 4: choose k <= 4"
    ):
        topk_recall(x, x, k=5)
    with pytest.raises(OptionError, match=r"k must be at least 1, got 0"):
        topk_recall(x, x, k=0)
    with pytest.raises(NonFiniteError, match=r"first must be finite, but 1 of its 8"):
        kendall_tau(x.masked_fill(x == x.max(), torch.inf), x)
    with pytest.raises(OptionError, match=r"add up to the 4 tokens of the scores, got \[2, 1\] \(sum 3\)"):
        training_attention(x[None], x[None], torch.tensor([2, 1]))
    with pytest.raises(OptionError, match=r"query vectors of one model are needed, got layers and width \(2, 4\)"):
        finetuning_scores(torch.zeros(5, 2, 4), torch.zeros(3, 1, 4))
