"""How changes of weights enter a forward pass: added to the products, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from metaopt_lens.finetuning._settings import MLP, PROJECTIONS
from metaopt_lens.models import Hook, Late, LensModel

# What each projection is applied to: the attention's input x and z, the MLP's input u and hidden layer h.
SOURCE = {"q": "x", "k": "x", "v": "x", "o": "z", "mlp_in": "u", "mlp_gate": "u", "mlp_out": "h"}


def change_hooks(
    model: LensModel,
    layer: int,
    tensors: Mapping[str, Tensor],
    *,
    rows: slice = slice(None),
    seen: Callable[[str, Tensor], None] | None = None,
) -> list[Hook]:
    """Hooks that add ``x w + b`` to a layer's q, k and v before QK-norm and rotary, ``z w_o + b_o`` to its output, and
    ``w u`` and ``w_out h`` to the MLP's products and output.

    Args:
        tensors: the layer's changes by field name of `WeightUpdate`.
        rows: change these sequences of the batch only.
        seen: is handed the inputs (see `SOURCE`) and every changed product, by the name of its projection.
    """
    state: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def store(tensor: Tensor) -> None:
            state[name] = tensor
            if seen is not None:
                seen(name, tensor)

        return store

    def add(projection: str) -> Callable[[Tensor], Tensor]:
        matrix, bias = _row_matrix(projection, tensors[f"w_{projection}"]), tensors.get(f"b_{projection}")

        def change(tensor: Tensor) -> Tensor:
            source = state[SOURCE[projection]][rows]
            source = source.flatten(2) if projection == "o" else source  # [batch, pos, (head d_head)]
            start, stop, _ = rows.indices(len(tensor))
            old = tensor[start:stop]
            delta = (source.to(matrix.dtype) @ matrix.to(source.device)).view(old.shape)
            if bias is not None:
                delta = delta + bias.to(delta)
            changed = old + delta.to(tensor.dtype)
            if len(changed) < len(tensor):
                changed = torch.cat([tensor[:start], changed, tensor[stop:]])
            if seen is not None:
                seen(projection, changed)
            return changed

        return change

    hooks: list[Hook] = []
    chosen = [p for p in PROJECTIONS if f"w_{p}" in tensors]
    inner = [p for p in chosen if p in ("q", "k", "v")]
    if inner or seen is not None:
        hooks.append(model.attention_input_hook(layer, keep("x")))
    hooks += [(model.hook_name(p, layer), add(p)) for p in inner]
    if "o" in chosen:
        hooks += [(model.hook_name("z", layer), Late(keep("z"))), (model.hook_name("attn_out", layer), add("o"))]
    if any(p in MLP for p in chosen):
        site = model.mlp_site(layer)
        hooks.append(site.input_hook(keep("u")))
        hooks += [(site.products[p.removeprefix("mlp_")], add(p)) for p in ("mlp_in", "mlp_gate") if p in chosen]
        if "mlp_out" in chosen:
            hooks += [(site.hidden_name, Late(keep("h"))), (site.out_name, add("mlp_out"))]
    return hooks


def _row_matrix(projection: str, weight: Tensor) -> Tensor:
    """The matrix that a row is multiplied with from the right, ``[d_in, d_out]``."""
    if projection in MLP:
        return weight.T
    return weight.flatten(0, 1) if projection == "o" else weight.transpose(0, 1).flatten(1)
