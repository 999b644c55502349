"""What a model's output projections make of head outputs, in as few numbers as say everything."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.models import LensModel
from metaopt_lens.runs import all_heads_output


@dataclass(frozen=True, eq=False)
class OutputSpace:
    """The output projections of a model.

    Attributes:
        model: never modified.
    """

    model: LensModel

    @cached_property
    def _triangles(self) -> list[Float[Tensor, "head rank d_head"]]:
        """R of ``W_O^T = Q R``, of every layer."""
        weights = [self.model.w_o(layer).detach().double().cpu() for layer in range(self.model.info.n_layers)]
        return [torch.linalg.qr(weight.mT, mode="r").R for weight in weights]

    def coordinates(self, z: Float[Tensor, "query layer head d_head"]) -> Float[Tensor, "query layer head rank"]:
        """Parts of z in each head's output space: lengths and angles are those after W_O, in the residual stream.

        Args:
            z: in d_head, on the CPU, in float64.
        """
        return torch.stack([torch.einsum("qhd,hrd->qhr", z[:, i], r) for i, r in enumerate(self._triangles)], dim=1)

    def attention(
        self, z: Float[Tensor, "query layer head d_head"], update: WeightUpdate | None
    ) -> Float[Tensor, "query layer d_model"]:
        """All heads of every layer together, after W_O and b_O.

        Args:
            z: head outputs.
            update: what the model has that made them, if anything.
        """
        w_o, b_o = (None, None) if update is None else (update.w_o, update.b_o)
        return all_heads_output(self.model, z, w_o=w_o, b_o=b_o)
