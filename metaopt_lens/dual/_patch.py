"""Changes of a matrix that turn one input's product into another's (arXiv:2511.17864; docs/theory.md, section 9)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def right_factor(x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_in"]:
    """``x / |x|^2``: of all changes ``dW`` with ``dW x = t`` the smallest is ``t (x) right_factor(x)``.

    Args:
        x: what the matrix is applied to; must not vanish.

    Returns:
        The right factor, whose product with `x` is 1.
    """
    return x / x.square().sum(-1, keepdim=True)


def rank_one_product(
    x: Float[Tensor, "*row d_in"], left: Float[Tensor, "*row d_out"], right: Float[Tensor, "*row d_in"]
) -> Float[Tensor, "*row d_out"]:
    """``(left (x) right) x``, a change of its own for every row.

    Args:
        x: what the changed matrix is applied to.
        left: left factors of the changes.
        right: right factors.

    Returns:
        What the change adds to ``W x``.
    """
    return (x * right).sum(-1, keepdim=True) * left


def ridge_right_factors(inputs: Float[Tensor, "fit d_in"], ridge: float) -> Float[Tensor, "fit d_in"]:
    """Right factors of ``argmin sum_k |t_k - dW x_k|^2 + lambda |dW|^2``, whose left factors are the targets t_k.

    ``dW = T^T (X X^T + lambda 1)^-1 X`` with a row of T and of X for every k, so that no matrix of the size of W is
    made. ``lambda = ridge`` times the mean of ``|x_k|^2``.

    Args:
        inputs: the x_k.
        ridge: weight of the penalty, relative to the mean square of an input; above 0.

    Returns:
        ``(X X^T + lambda 1)^-1 X``.
    """
    gram = inputs @ inputs.mT
    penalty = ridge * gram.diagonal().mean()
    ridged = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(ridged, inputs)
    return found


def ridge_scale(
    targets: Float[Tensor, "fit d_model"], normalized: Float[Tensor, "fit d_model"], ridge: float
) -> Float[Tensor, " d_model"]:
    """``argmin sum_k |t_k - y_k * ds|^2 + lambda |ds|^2``, coordinate by coordinate.

    Args:
        targets: the t_k.
        normalized: the y_k.
        ridge: weight of the penalty, relative to the mean of the ``sum_k y_k^2``; above 0.

    Returns:
        The change of the scale.
    """
    squares = normalized.square().sum(0)
    return (targets * normalized).sum(0) / (squares + ridge * squares.mean())
