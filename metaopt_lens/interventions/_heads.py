"""Which heads an intervention acts on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from metaopt_lens._errors import HeadError
from metaopt_lens._types import HeadRef
from metaopt_lens.models import ModelInfo

Heads = Sequence[str | HeadRef | tuple[int, int]] | str | None


def head_mask(
    info: ModelInfo,
    heads: Iterable[str | HeadRef | tuple[int, int]] | str | None = None,
    layers: Iterable[int] | None = None,
) -> Bool[Tensor, "layer head"]:
    """The heads named that lie in the layers named; None names all.

    Raises:
        HeadError: an unknown head or layer, or nothing selected.
    """
    mask = torch.zeros(info.n_layers, info.n_heads, dtype=torch.bool)
    if heads is None:
        mask[:] = True
    else:
        for head in [heads] if isinstance(heads, str) else heads:
            ref = HeadRef.of(head)
            ref.check(info.n_layers, info.n_heads)
            mask[ref.layer, ref.head] = True
    if layers is not None:
        chosen = torch.zeros(info.n_layers, dtype=torch.bool)
        for layer in layers:
            HeadRef(layer, 0).check(info.n_layers, info.n_heads)
            chosen[layer] = True
        mask &= chosen[:, None]
    if not bool(mask.any()):
        raise HeadError("the selection is empty: name at least one head (as in 'L3H7') in the layers chosen.")
    return mask
