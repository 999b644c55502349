"""One step's gradients from its factors: ``grad dW = sum_i x_i (x) e_i`` with ``e_i = dL/dk_i``.

Only the error signals go through autograd, so that no gradient of a weight's size is made in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metaopt_lens.finetuning._added import SOURCE
from metaopt_lens.finetuning._examples import TrainingExample
from metaopt_lens.finetuning._update import StepFactors
from metaopt_lens.models import Hook, LensModel


class Tape:
    """Collects inputs and changed projections of a forward pass, by layer."""

    def __init__(self, model: LensModel, projections: Sequence[str], *, queries: bool) -> None:
        self._model = model
        self._projections = tuple(projections)
        self._keep_queries = queries
        self._inputs: dict[tuple[str, int], Tensor] = {}  # see `SOURCE`
        self._changed: dict[tuple[str, int], Tensor] = {}
        self._errors: dict[tuple[str, int], Tensor] = {}
        self._queries: dict[int, Tensor] = {}

    def layer(self, layer: int) -> Callable[[str, Tensor], None]:
        """What `change_hooks` hands its tensors to."""

        def seen(name: str, tensor: Tensor) -> None:
            if name in SOURCE.values():
                self._inputs[name, layer] = tensor.detach()
            else:
                if not tensor.requires_grad:  # nothing below it does
                    tensor.requires_grad_()
                self._changed[name, layer] = tensor

        return seen

    def query_hooks(self, layer: int) -> list[Hook]:
        """Hooks that keep the queries, where asked for."""

        def keep(tensor: Tensor) -> None:
            self._queries[layer] = tensor.detach()

        return [(self._model.hook_name("q", layer), keep)] if self._keep_queries else []

    def backward(self, loss: Tensor) -> None:
        """Find the error signals."""
        errors = torch.autograd.grad(loss, list(self._changed.values()))
        self._errors = dict(zip(self._changed, errors, strict=True))
        self._changed.clear()

    def write_gradients(self, leaves: Mapping[str, Sequence[Tensor]]) -> None:
        """Overwrite the gradients of the leaves: ``[d_model, head, d_head]``, for o ``[head, d_head, d_model]``,
        for the MLP ``[d_in, d_out]``.
        """
        for (projection, layer), error in self._errors.items():
            x = self._inputs[SOURCE[projection], layer].flatten(0, 1).flatten(1)
            weight, biases = leaves[f"w_{projection}"][layer].grad, leaves.get(f"b_{projection}")
            assert weight is not None
            e = error.flatten(0, 1).flatten(1).to(weight)
            torch.mm(x.to(weight).T, e, out=weight.view(x.shape[1], e.shape[1]))
            if biases is not None:
                bias = biases[layer].grad
                assert bias is not None
                torch.sum(e, dim=0, out=bias.view(-1))

    def factors(self, batch: Sequence[TrainingExample]) -> StepFactors:
        """Inputs, error signals and queries of the step."""
        layers = range(self._model.info.n_layers)
        errors = {
            name: torch.stack([self._errors[name, layer] for layer in layers])
            for name in self._projections
            if name in ("q", "k", "v")
        }
        return StepFactors(
            x=torch.stack([self._inputs["x", layer] for layer in layers]),
            e_q=errors.get("q"),
            e_k=errors.get("k"),
            e_v=errors.get("v"),
            q=torch.stack([self._queries[layer] for layer in layers]),
            n_tokens=tuple(len(example.ids) for example in batch),
        )
