"""A control for momentum attention: the same weights, but for the last few values only."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from metaopt_lens.dual import momentum_weights
from metaopt_lens.interventions import Change, Sight
from metaopt_lens.models import Hook, Late, LensModel


@dataclass(frozen=True, eq=False)
class ShortConvolution:
    """Adds ``sum_{i=t-lags}^{t-1} eta^(t-i) v_i`` to every head: momentum attention that forgets after `lags` tokens.

    If it helps a model as much as the whole average does, what helped was not the averaging. For models that are
    trained with it; `decompose` does not know this term.

    Attributes:
        eta: of every head.
        lags: how many past tokens.
    """

    eta: Float[Tensor, "layer head"]
    lags: int

    def change(self, model: LensModel) -> Change:  # noqa: ARG002 - the eta given is of every layer
        """The sum, as what is added to z.

        Args:
            model: the wrapped model that the change is for.
        """
        return Change(addition=self._hooks)

    def _hooks(self, model: LensModel, sight: Sight) -> list[Hook]:
        return [hook for layer in range(model.info.n_layers) for hook in self._layer(model, layer, sight)]

    def _layer(self, model: LensModel, layer: int, sight: Sight) -> list[Hook]:
        kept: list[Tensor] = []

        def keep(v: Tensor) -> None:
            kept[:] = [v]

        def add(z: Tensor) -> Tensor:
            seen = sight.sources(layer, kept.pop())
            weights = momentum_weights(self.eta[layer].to(seen.share), seen.dst_positions, seen.positions)
            near = seen.dst_positions[:, :, None] - seen.positions[:, None] <= self.lags  # [row, dst, src]
            term = seen.weighted(weights * near[:, None])
            return (z.to(term.dtype) + term).to(z.dtype)

        return [(model.hook_name("v", layer), Late(keep)), (model.hook_name("z", layer), add)]
