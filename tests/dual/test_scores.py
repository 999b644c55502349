"""Scores and softmax as models compute them, against a loop written by hand."""

from __future__ import annotations

import math

import pytest
import torch

from metaopt_lens.dual import ScoreRule, attention_scores, softmax_with_sink, visible_sources

F64 = torch.float64
HEADS, KV, D, PREFIX, NEW = 4, 2, 3, 5, 4

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=F64)
RULES = {
    "plain": ScoreRule(scale=0.7),
    "softcap": ScoreRule(scale=0.7, softcap=1.5),
    "window": ScoreRule(scale=0.7, window=3),
    "alibi": ScoreRule(scale=0.7, alibi_slopes=SLOPES),
    "everything": ScoreRule(scale=0.7, softcap=1.5, window=4, alibi_slopes=SLOPES),
}
SINKS = torch.tensor([0.5, -3.0, 2.0, 0.0], dtype=F64)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_scores_and_pattern_equal_a_loop(name: str, with_sinks: bool) -> None:
    rule = RULES[name]
    generator = torch.Generator().manual_seed(0)
    n = PREFIX + NEW
    q = torch.randn(2, NEW, HEADS, D, generator=generator, dtype=F64)
    k = torch.randn(2, n, KV, D, generator=generator, dtype=F64)
    scores = attention_scores(rule, q, k, dst_positions=torch.arange(PREFIX, n), src_positions=torch.arange(n))
    pattern, sink = softmax_with_sink(scores, SINKS if with_sinks else None)
    for batch in range(2):
        for head in range(HEADS):
            for dst in range(NEW):
                j = PREFIX + dst
                row = []
                for i in range(n):
                    s = 0.7 * sum(
                        float(q[batch, dst, head, c] * k[batch, i, head // (HEADS // KV), c]) for c in range(D)
                    )
                    if rule.softcap is not None:
                        s = rule.softcap * math.tanh(s / rule.softcap)
                    if rule.alibi_slopes is not None:
                        s -= float(SLOPES[head]) * (j - i)
                    if i > j or (rule.window is not None and j - i >= rule.window):
                        s = -math.inf
                    row.append(s)
                torch.testing.assert_close(scores[batch, head, dst], torch.tensor(row, dtype=F64))
                extra = math.exp(float(SINKS[head])) if with_sinks else 0.0
                total = sum(math.exp(s) for s in row) + extra
                expected = torch.tensor([math.exp(s) / total for s in row], dtype=F64)
                torch.testing.assert_close(pattern[batch, head, dst], expected)
                assert float(sink[batch, head, dst]) == pytest.approx(extra / total, abs=1e-15)


def test_a_window_of_one_sees_only_itself_and_every_token_sees_itself() -> None:
    positions = torch.arange(5)
    assert torch.equal(visible_sources(ScoreRule(scale=1.0, window=1), positions, positions), torch.eye(5).bool())
    causal = visible_sources(ScoreRule(scale=1.0), positions, positions)
    assert torch.equal(causal, torch.ones(5, 5).tril().bool())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_but_not_computed_in(dtype: torch.dtype) -> None:
    q = (torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1)) * 60).to(dtype)
    k = (torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2)) * 60).to(dtype)
    scores = attention_scores(
        ScoreRule(scale=1.0), q, k, dst_positions=torch.tensor([2]), src_positions=torch.arange(3)
    )
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), torch.einsum("dhc,shc->hds", q.double(), k.double()), rtol=1e-6, atol=1e-2
    )


def test_sink_far_above_all_scores_takes_everything() -> None:
    pattern, sink = softmax_with_sink(torch.zeros(1, 1, 3), torch.tensor([1000.0]))
    assert not pattern.any()
    assert float(sink) == 1.0
