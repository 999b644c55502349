"""The implicit weight update of an MLP that follows attention (arXiv:2507.16003; docs/theory.md, section 5)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.dual._weighted import at_least_float32


def implicit_weight_update(
    weight: Float[Tensor, "d_out d_in"],
    u: Float[Tensor, " d_in"],
    u_context: Float[Tensor, " d_in"],
) -> tuple[Float[Tensor, " d_out"], Float[Tensor, " d_in"]]:
    """``dW = W (u_C - u) u^T / |u|^2``, so that ``(W + dW) u = W u_C``: rank one, as its two factors.

    Column convention: ``dW = left (x) right``. Equal to context at this input only.

    Args:
        weight: an input matrix of the MLP.
        u: the MLP's normed input at one token without context.
        u_context: the same input in context.

    Raises:
        UndefinedMetricError: `u` vanishes, so no matrix maps it anywhere else.
    """
    u, u_context = at_least_float32(u), at_least_float32(u_context)
    square = u.square().sum()
    if not float(square) > 0:
        raise UndefinedMetricError("the implicit update needs an MLP input that is not 0 without context.")
    return weight.to(u) @ (u_context - u), u / square
