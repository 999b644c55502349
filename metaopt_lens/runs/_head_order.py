"""The one order of heads there is."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._types import HeadRef


def rank_heads(values: Float[Tensor, "layer head"], top: int | None = None) -> list[HeadRef]:
    """Heads by a number each has, largest first; equal ones in the order of layers.

    Args:
        values: one number per head: a measured effect, or the size of its meta-gradient in the residual stream; NaN for
            heads that are left out.
        top: how many to return; all by default.
    """
    n_heads = values.shape[-1]
    flat = values.detach().flatten()  # layer head -> (layer head)
    order = [index for index in flat.argsort(descending=True, stable=True).tolist() if not flat[index].isnan()][:top]
    return [HeadRef(index // n_heads, index % n_heads) for index in order]
