"""A control for momentum attention: the same weights, but for the last few values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.dual import momentum_weights, weighted_values
from metaopt_lens.models import PASS, Hook, HostPass, Late, LensModel


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

    def hooks(self, model: LensModel) -> list[Hook]:
        """The hooks that add it.

        Args:
            model: the wrapped model that the hooks are for.
        """
        running: list[HostPass] = []

        def begin(host_pass: HostPass) -> None:
            running[:] = [host_pass]

        hooks: list[Hook] = [(PASS, begin)]
        for layer in range(model.info.n_layers):
            hooks += self._layer(model, layer, lambda: running[0])
        return hooks

    def _layer(self, model: LensModel, layer: int, current: Callable[[], HostPass]) -> list[Hook]:
        seen: list[Tensor] = []

        def keep(v: Tensor) -> None:
            seen[:] = [v]

        def add(z: Tensor) -> Tensor:
            host_pass, v = current(), seen.pop()
            values = host_pass.all_values(layer, v)
            index, valid = host_pass.sources(layer, values)
            if bool(valid.all()):  # all rows have the same weights
                index, valid = index[:1], valid[:1]
            new = index[:, -v.shape[1] :]
            weights = momentum_weights(self.eta[layer].to(v.device), new, index)  # [row, head, dst, src]
            near = (new[:, :, None] - index[:, None] <= self.lags) & valid[:, None]
            weights = torch.where(near[:, None], weights, 0.0).expand(len(v), -1, -1, -1)
            term = weighted_values(weights.to(torch.promote_types(v.dtype, torch.float32)), values)
            return (z.to(term.dtype) + term).to(z.dtype)

        return [(model.hook_name("v", layer), Late(keep)), (model.hook_name("z", layer), add)]
