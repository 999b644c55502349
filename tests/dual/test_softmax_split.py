"""The exact split and its inverse, on plain tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import SUM, rounding
from torch import Tensor

from metaopt_lens import MetaoptLensError
from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import SoftmaxParts, merge_softmax, softmax_with_sink, split_softmax

HEADS, D_HEAD, BEFORE, DEMOS, AFTER = 3, 5, 2, 7, 4
N = BEFORE + DEMOS + AFTER
SPAN = TokenSpan(BEFORE, BEFORE + DEMOS)
UNITS = rounding(SUM, 1.0)  # scores to probabilities, and these times values; of the largest number expected
REMAINING = [10.0**-e for e in range(3, 13)]


def scores_with_remaining(remaining: float, seed: int) -> Tensor:
    """float32 scores [head, 1, src] whose softmax leaves about `remaining` outside the demonstrations."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(HEADS, 1, N, generator=generator, dtype=torch.float64)
    inside = torch.logsumexp(scores[..., SPAN.slice], -1, keepdim=True)
    outside = torch.logsumexp(torch.cat([scores[..., : SPAN.start], scores[..., SPAN.stop :]], -1), -1, keepdim=True)
    scores[..., SPAN.slice] += outside - inside - math.log(remaining)
    return scores.float()


def oracle_without_demos(scores: Tensor, values: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """z with D masked out, and the mass that remained, in float64 from the same float32 scores."""
    scores, values = scores.double(), values.double()
    column = None if sinks is None else sinks.double()[:, None, None].expand(HEADS, 1, 1)
    every = scores if column is None else torch.cat([scores, column], -1)
    hidden = every.clone()
    hidden[..., SPAN.slice] = -torch.inf
    weights = torch.softmax(hidden, -1)[..., :N]
    remaining = torch.exp(torch.logsumexp(hidden, -1) - torch.logsumexp(every, -1))
    return torch.einsum("hds,shk->dhk", weights, values), remaining.mT


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("remaining", REMAINING)
def test_without_demos_is_accurate_however_little_remains(remaining: float, with_sinks: bool) -> None:
    for seed in range(5):
        scores = scores_with_remaining(remaining, seed)
        values = torch.randn(N, HEADS, D_HEAD, generator=torch.Generator().manual_seed(seed + 100))
        sinks = torch.randn(HEADS, generator=torch.Generator().manual_seed(seed + 200)) if with_sinks else None
        pattern, sink = softmax_with_sink(scores, sinks)
        parts = split_softmax(pattern, values, SPAN, sink=None if sinks is None else sink)
        expected, left = oracle_without_demos(scores, values, sinks)
        assert 0.2 * remaining < float(left.min()) < 20 * remaining
        assert relative_error(parts.without_demos, expected) <= UNITS
        assert float(((parts.remaining.double() - left) / left).abs().max()) <= UNITS
        z = torch.einsum("hds,shk->dhk", softmax_with_sink(scores.double(), sinks)[0], values.double())
        assert relative_error(parts.z, z) <= UNITS
        assert relative_error(parts.update, z - expected) <= UNITS


@pytest.mark.parametrize(("remaining", "at_least"), [(1e-5, 1e-3), (1e-7, 1e-1), (1e-12, 1.0)])
def test_why_remaining_is_summed_and_not_subtracted(remaining: float, at_least: float) -> None:
    """The same quantity as 1 - alpha in float32: wrong in the third digit at 1e-5, in all of them at 1e-7."""
    worst = 0.0
    for seed in range(5):
        scores = scores_with_remaining(remaining, seed)
        values = torch.randn(N, HEADS, D_HEAD, generator=torch.Generator().manual_seed(seed + 100))
        parts = split_softmax(torch.softmax(scores, -1), values, SPAN)
        naive = parts.zero_shot / (1 - parts.mass)[..., None]
        expected, _ = oracle_without_demos(scores, values, None)
        error = relative_error(naive, expected)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    assert worst > at_least


def test_sink_counts_to_what_remains_and_leaves_no_value() -> None:
    scores = torch.randn(HEADS, 2, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    values = torch.randn(N, HEADS, D_HEAD, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pattern, sink = softmax_with_sink(scores, sinks)
    torch.testing.assert_close(pattern.sum(-1) + sink, torch.ones(HEADS, 2, dtype=torch.float64))
    parts = split_softmax(pattern, values, SPAN, sink=sink)
    torch.testing.assert_close(parts.mass + parts.remaining, torch.ones(2, HEADS, dtype=torch.float64))
    forgotten = split_softmax(pattern, values, SPAN)
    assert not torch.allclose(parts.without_demos, forgotten.without_demos, rtol=1e-3)


def test_nothing_visible_gives_no_update() -> None:
    pattern = torch.zeros(HEADS, 1, N)
    pattern[..., -2:] = torch.tensor([0.3, 0.7])
    values = torch.randn(N, HEADS, D_HEAD, generator=torch.Generator().manual_seed(3))
    parts = split_softmax(pattern, values, SPAN)
    assert not parts.mass.any()
    assert torch.equal(parts.update, torch.zeros_like(parts.z))
    assert torch.equal(parts.meta_gradient, torch.zeros_like(parts.z))


def test_grouped_heads_read_their_own_key_value_head() -> None:
    generator = torch.Generator().manual_seed(4)
    pattern = torch.softmax(torch.randn(2, 6, 3, N, generator=generator, dtype=torch.float64), -1)
    values = torch.randn(2, N, 2, D_HEAD, generator=generator, dtype=torch.float64)
    parts = split_softmax(pattern, values, SPAN)
    for batch in range(2):
        for head in range(6):
            for dst in range(3):
                z = sum(pattern[batch, head, dst, s] * values[batch, s, head // 3] for s in range(N))
                torch.testing.assert_close(parts.z[batch, dst, head], z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    pattern = torch.softmax(torch.randn(1, 1, 4096, generator=torch.Generator().manual_seed(5)), -1).to(dtype)
    values = torch.ones(4096, 1, 1, dtype=dtype)
    parts = split_softmax(pattern, values, TokenSpan(1, 4000))
    exact = pattern[..., 1:4000].double().sum()
    assert parts.mass.dtype == torch.float32
    assert abs(float(parts.meta_gradient) - float(exact)) < 1e-5
    assert abs(float(parts.mass) - float(exact)) < 1e-5


def test_demonstrations_past_the_end_are_refused() -> None:
    pattern = torch.softmax(torch.randn(1, 1, 4), -1)
    with pytest.raises(MetaoptLensError, match=r"end at position 9, but there are only 4 sources"):
        split_softmax(pattern, torch.randn(4, 1, 2), TokenSpan(1, 9))


# ---- merge ----------------------------------------------------------------------------------------------------------


def one_softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(scores, -1) @ values, torch.logsumexp(scores, -1)


@settings(max_examples=60, deadline=None)
@given(
    rest=st.lists(st.floats(-300, 300), min_size=1, max_size=6),
    demos=st.lists(st.one_of(st.floats(-300, 300), st.just(-math.inf)), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_merge_is_the_softmax_over_the_union(rest: list[float], demos: list[float], seed: int) -> None:
    z_scores, d_scores = (torch.tensor(x, dtype=torch.float64) for x in (rest, demos))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rest) + len(demos), 3, generator=generator, dtype=torch.float64)
    z_z, lse_z = one_softmax(z_scores, values[: len(rest)])
    z_d, lse_d = one_softmax(d_scores, values[len(rest) :])  # NaN if all of D is hidden
    whole, _ = one_softmax(torch.cat([z_scores, d_scores]), values)
    merged = merge_softmax(z_z[None], lse_z[None], z_d[None], lse_d[None])[0]
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-12)


def test_merge_then_split_is_the_identity() -> None:
    scores = scores_with_remaining(1e-9, 7).double()
    values = torch.randn(N, HEADS, D_HEAD, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    parts: SoftmaxParts = split_softmax(torch.softmax(scores, -1), values, SPAN)
    inside = scores[..., SPAN.slice]
    outside = torch.cat([scores[..., : SPAN.start], scores[..., SPAN.stop :]], -1)
    z_d = torch.einsum("hds,shk->dhk", torch.softmax(inside, -1), values[SPAN.slice])
    merged = merge_softmax(parts.without_demos, torch.logsumexp(outside, -1).mT, z_d, torch.logsumexp(inside, -1).mT)
    torch.testing.assert_close(merged, parts.z, rtol=0, atol=1e-12)


def test_a_hidden_part_changes_nothing_not_even_gradients() -> None:
    z = torch.tensor([[1.0, -2.0], [0.5, 4.0]], requires_grad=True)
    lse = torch.tensor([0.3, -1.0], requires_grad=True)
    z_d = torch.tensor([[torch.nan, torch.nan], [1.0, 1.0]], requires_grad=True)
    lse_d = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    merged = merge_softmax(z, lse, z_d, lse_d)
    assert torch.equal(merged[0], z[0])
    merged.sum().backward()
    for tensor in (z, lse, z_d, lse_d):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    assert z.grad is not None
    assert torch.equal(z.grad[0], torch.ones(2))
    assert z_d.grad is not None
    assert not z_d.grad[0].any()


@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_merge_does_not_overflow(gap: float) -> None:
    z, z_d = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    merged = merge_softmax(z, torch.tensor([0.0]), z_d, torch.tensor([gap]))
    assert torch.equal(merged, z_d if gap > 0 else z)
