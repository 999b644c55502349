"""The smallest change of a matrix that maps an input to a target (docs/theory.md, section 9)."""

from __future__ import annotations

import torch

from metaopt_lens.dual import rank_one_product, right_factor


def test_the_pure_identity() -> None:
    """``(W + W (u_C - u) u^T / |u|^2) u = W u_C``."""
    generator = torch.Generator().manual_seed(0)
    weight, u, u_context = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 5), (5,), (5,))
    )
    left, right = weight @ (u_context - u), right_factor(u)
    torch.testing.assert_close((weight + torch.outer(left, right)) @ u, weight @ u_context, rtol=0, atol=1e-12)
    torch.testing.assert_close(weight @ u + rank_one_product(u, left, right), weight @ u_context, rtol=0, atol=1e-12)


def test_no_smaller_change_does_it() -> None:
    """Moore and Penrose: the least-norm solution of ``dW x = t``, found without our formula."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    for row, target, right in zip(x, targets, right_factor(x), strict=True):
        smallest = target[:, None] @ torch.linalg.pinv(row[:, None])
        torch.testing.assert_close(torch.outer(target, right), smallest, rtol=0, atol=1e-12)
