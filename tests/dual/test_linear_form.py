"""The relaxed form against loops: weights, parts, factored memories, rank."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import (
    ScoreRule,
    linear_memory,
    linear_weights,
    split_linear,
    split_sources,
    visible_sources,
    weighted_values,
)

F64 = torch.float64


@settings(max_examples=25, deadline=None)
@given(
    kv=st.integers(1, 2),
    group=st.integers(1, 3),
    d=st.integers(1, 4),
    n_demos=st.integers(0, 4),
    window=st.one_of(st.none(), st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
def test_parts_equal_a_loop(kv: int, group: int, d: int, n_demos: int, window: int | None, seed: int) -> None:
    n, n_dst = n_demos + 5, 2
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n_dst, kv * group, d, generator=generator, dtype=F64)
    k, v = (torch.randn(n, kv, d, generator=generator, dtype=F64) for _ in range(2))
    demos = TokenSpan(2, 2 + n_demos)
    dst = [n - 2, n - 1]
    rule = ScoreRule(scale=0.3, window=window)  # the scale must not matter
    visible = visible_sources(rule, torch.tensor(dst), torch.arange(n))
    parts = split_linear(q, k, v, visible, demos)
    for j, h in itertools.product(range(n_dst), range(kv * group)):
        inside, outside = torch.zeros(d, dtype=F64), torch.zeros(d, dtype=F64)
        for i in range(n):
            if i > dst[j] or (window is not None and i <= dst[j] - window):
                continue
            term = v[i, h // group] * sum(k[i, h // group, c] * q[j, h, c] for c in range(d))
            if i in demos:
                inside += term
            else:
                outside += term
        torch.testing.assert_close(parts.meta_gradient[j, h], inside)
        torch.testing.assert_close(parts.zero_shot[j, h], outside)
        torch.testing.assert_close(parts.total[j, h], inside + outside)


def test_memory_applied_to_a_query_is_linear_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 6, 4, generator=generator, dtype=F64) for _ in range(2))
    q = torch.randn(4, generator=generator, dtype=F64)
    memory = linear_memory(k, v)
    for head in range(2):
        expected = sum(v[head, i] * (k[head, i] @ q) for i in range(6))
        torch.testing.assert_close(memory.AB[head] @ q, expected)
        outer = sum(torch.outer(v[head, i], k[head, i]) for i in range(6))
        torch.testing.assert_close(memory.AB[head], outer)


def test_rank_is_at_most_the_number_of_tokens_and_of_dimensions() -> None:
    generator = torch.Generator().manual_seed(1)
    for n in (1, 3, 8, 20):
        k, v = (torch.randn(n, 8, generator=generator, dtype=F64) for _ in range(2))
        assert int(torch.linalg.matrix_rank(linear_memory(k, v).AB)) == min(8, n)
    repeated = torch.randn(1, 8, generator=generator, dtype=F64).expand(5, 8)
    assert int(torch.linalg.matrix_rank(linear_memory(repeated, torch.randn(5, 8, dtype=F64)).AB)) == 1


def test_order_and_regrouping_of_demonstrations_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn(6, 4, generator=generator, dtype=F64) for _ in range(2))
    order = torch.randperm(6, generator=generator)
    torch.testing.assert_close(linear_memory(k, v).AB, linear_memory(k[order], v[order]).AB)
    halves = linear_memory(k[:3], v[:3]).AB + linear_memory(k[3:], v[3:]).AB
    torch.testing.assert_close(linear_memory(k, v).AB, halves)


def test_hidden_sources_weigh_nothing_even_if_infinite() -> None:
    k = torch.tensor([[[1.0]], [[torch.inf]]])
    weights = linear_weights(torch.ones(1, 1, 1), k, torch.tensor([[True, False]]))
    assert torch.equal(weights, torch.tensor([[[1.0, 0.0]]]))


def test_split_sources_leaves_nothing_out() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 3, 9, generator=generator, dtype=F64)
    values = torch.randn(9, 1, 4, generator=generator, dtype=F64)
    for start, stop in [(0, 0), (0, 9), (2, 5), (0, 4), (4, 9), (9, 9)]:
        outside, inside = split_sources(weights, values, TokenSpan(start, stop))
        torch.testing.assert_close(outside + inside, weighted_values(weights, values))
        torch.testing.assert_close(inside, torch.einsum("hds,sk->dhk", weights[..., start:stop], values[start:stop, 0]))
