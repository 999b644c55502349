"""Ground truth: von Oswald et al. (arXiv:2212.07677), where dW_ICL is a gradient step by construction.

Loss 1/(2N) sum |W_0 x_i - y_i|^2. Tokens (x_i, y_i); W_K = W_Q = diag(I, 0), W_V = [[0, 0], [W_0, -I]], output
projection (eta / N) I. The y part of the head's output is minus the change of the prediction: that construction stores
minus the prediction in the y slot and negates it when reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import linear_memory, split_linear

F64 = torch.float64
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Regression:
    x: Tensor  # [N, d_x]
    y: Tensor  # [N, d_y]
    w0: Tensor  # [d_y, d_x]
    x_query: Tensor
    eta: float

    def explicit_step(self) -> Tensor:
        """dW = -(eta/N) sum_i (W_0 x_i - y_i) x_i^T, in a loop."""
        step = torch.zeros_like(self.w0)
        for x, y in zip(self.x, self.y, strict=True):
            step -= self.eta / len(self.x) * torch.outer(self.w0 @ x - y, x)
        return step


@dataclass(frozen=True)
class Attention:
    """The construction, run through the library's linear form."""

    delta_w_icl: Tensor  # with the output projection applied
    meta_gradient: Tensor
    zero_shot: Tensor
    query_term: Tensor


def build(problem: Regression) -> Attention:
    (n, d_x), d_y = problem.x.shape, problem.y.shape[1]
    # The query's y slot holds minus its prediction's start value, W_0 x.
    query = torch.cat([problem.x_query, -(problem.w0 @ problem.x_query)])
    tokens = torch.cat([torch.cat([problem.x, problem.y], dim=1), query[None]])
    w_k = torch.diag(torch.cat([torch.ones(d_x), torch.zeros(d_y)])).to(F64)
    w_v = torch.zeros(d_x + d_y, d_x + d_y, dtype=F64)
    w_v[d_x:, :d_x], w_v[d_x:, d_x:] = problem.w0, -torch.eye(d_y, dtype=F64)
    projection = problem.eta / n
    k, v, q = tokens @ w_k.T, tokens @ w_v.T, tokens[-1:] @ w_k.T
    demos = TokenSpan(0, n)
    visible = torch.ones(1, n + 1, dtype=torch.bool)
    parts = split_linear(q[:, None], k[:, None], v[:, None], visible, demos)
    return Attention(
        delta_w_icl=projection * linear_memory(k[demos.slice], v[demos.slice]).AB,
        meta_gradient=projection * parts.meta_gradient[0, 0],
        zero_shot=projection * parts.zero_shot[0, 0],
        query_term=projection * v[-1] * (k[-1] @ q[0]),
    )


@st.composite
def problems(draw: st.DrawFn) -> Regression:
    d_x, d_y, n = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    return Regression(normal(n, d_x), normal(n, d_y), normal(d_y, d_x), normal(d_x), draw(st.floats(0.01, 5.0)))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_delta_w_icl_is_the_gradient_step(problem: Regression) -> None:
    built, step = build(problem), problem.explicit_step()
    d_x = problem.x.shape[1]
    close(built.delta_w_icl[d_x:, :d_x], -step)
    rest = built.delta_w_icl.clone()
    rest[d_x:, :d_x] = 0.0
    assert not rest.any()
    # Applied to the query, read off with the construction's own sign: the change of the prediction.
    read = -built.meta_gradient[d_x:]
    close(read, step @ problem.x_query)
    cosine = torch.nn.functional.cosine_similarity(read, step @ problem.x_query, dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-9) or float((step @ problem.x_query).norm()) < 1e-7


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_with_the_sign_flipped_the_comparison_fails(problem: Regression) -> None:
    built, step = build(problem), problem.explicit_step()
    d_x = problem.x.shape[1]
    if float(step.abs().max()) < 1e-6 or float((step @ problem.x_query).abs().max()) < 1e-6:
        return  # a fit that is perfect from the start has no step to compare
    with pytest.raises(AssertionError):
        close(built.delta_w_icl[d_x:, :d_x], step)
    with pytest.raises(AssertionError):
        close(built.meta_gradient[d_x:], step @ problem.x_query)


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_the_explicit_step_is_autograds(problem: Regression) -> None:
    w = problem.w0.clone().requires_grad_()
    loss = (problem.x @ w.T - problem.y).square().sum() / (2 * len(problem.x))
    loss.backward()
    assert w.grad is not None
    close(problem.explicit_step(), -problem.eta * w.grad)
    stepped = problem.w0 - problem.eta * w.grad
    built, d_x = build(problem), problem.x.shape[1]
    close(problem.w0 @ problem.x_query - built.meta_gradient[d_x:], stepped @ problem.x_query)


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_the_querys_own_key_and_value_belong_to_the_zero_shot_part(problem: Regression) -> None:
    built = build(problem)
    close(built.zero_shot, built.query_term)
    # v_q = (0, W_0 x - y_slot) with y_slot = -W_0 x: a term that is far from zero and no part of the step.
    assert float(built.zero_shot.abs().max()) > 0
