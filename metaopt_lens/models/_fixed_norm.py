"""A norm whose scale is held fixed: then it is linear (docs/theory.md, section 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

NormKind = Literal["LN", "RMS"]


@dataclass(frozen=True, eq=False)
class FixedNorm:
    """``norm(x) = gain (x - mean) / scale + bias``, linear in x once its scale is held where one run had it.

    Attributes:
        kind: ``"LN"`` subtracts the mean, ``"RMS"`` does not.
        eps: under the root of the scale.
        gain: what the normalised input is multiplied with; None for 1.
        bias: what is added last; None for 0.
    """

    kind: NormKind
    eps: float
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None

    def scale(self, x: Float[Tensor, "*item d_model"]) -> Float[Tensor, "*item"]:
        """What the norm divides by at `x`: root mean square or, for LayerNorm, standard deviation.

        Args:
            x: the norm's input.
        """
        centred = x - x.mean(-1, keepdim=True) if self.kind == "LN" else x
        return (centred.square().mean(-1) + self.eps).sqrt()

    def pulled_back(
        self, direction: Float[Tensor, "*item d_model"], scale: Float[Tensor, "*item"]
    ) -> Float[Tensor, "*item d_model"]:
        """The direction before the norm: ``norm(x) . direction = x . pulled_back + constant``.

        Args:
            direction: in the norm's output.
            scale: see `scale`.
        """
        before = direction if self.gain is None else direction * _like(self.gain, direction)
        before = before - before.mean(-1, keepdim=True) if self.kind == "LN" else before
        return before / scale[..., None]

    def constant(self, direction: Float[Tensor, "*item d_model"]) -> Float[Tensor, "*item"]:
        """What the norm's bias adds along a direction, whatever its input.

        Args:
            direction: in the norm's output.
        """
        if self.bias is None:
            return torch.zeros_like(direction[..., 0])
        return direction @ _like(self.bias, direction)


def _like(weight: Tensor, direction: Tensor) -> Tensor:
    return (weight if direction.requires_grad else weight.detach()).to(direction)
