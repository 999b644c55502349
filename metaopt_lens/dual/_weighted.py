"""Weighted sums of values over source positions, with grouped-query heads: what both forms of the split share."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import SpanError
from metaopt_lens._types import TokenSpan


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is read, not computed in: sums over hundreds of tokens need float32.

    Args:
        tensor: of any floating-point type.
    """
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def weighted_values(
    weights: Float[Tensor, "*batch head dst src"], values: Float[Tensor, "*batch src kv_head d_head"]
) -> Float[Tensor, "*batch dst head d_head"]:
    """``sum_i w_ji v_i`` for every head; head ``h`` reads key-value head ``h // (head / kv_head)``.

    Computed in float32 at least, whatever the dtype of the inputs.

    Args:
        weights: one weight for each destination and source.
        values: values of all sources.
    """
    grouped = rearrange(
        at_least_float32(weights), "... (kv group) dst src -> ... kv group dst src", kv=values.shape[-2]
    )
    columns = rearrange(at_least_float32(values), "... src kv d -> ... kv 1 src d")
    return rearrange(grouped @ columns, "... kv group dst d -> ... dst (kv group) d")


def split_sources(
    weights: Float[Tensor, "*batch head dst src"],
    values: Float[Tensor, "*batch src kv_head d_head"],
    demos: TokenSpan,
) -> tuple[Float[Tensor, "*batch dst head d_head"], Float[Tensor, "*batch dst head d_head"]]:
    """The sum of `weighted_values` over Z (all sources but the demonstrations) and over D (the demonstrations).

    Args:
        weights: one weight for each destination and source.
        values: values of all sources.
        demos: the demonstrations' source positions.

    Raises:
        SpanError: the demonstrations reach past the last source position.
    """
    n_src = weights.shape[-1]
    if demos.stop > n_src:
        raise SpanError(f"the demonstrations end at position {demos.stop}, but there are only {n_src} sources.")
    inside = weighted_values(weights[..., demos.slice], values[..., demos.slice, :, :])
    before = weighted_values(weights[..., : demos.start], values[..., : demos.start, :, :])
    after = weighted_values(weights[..., demos.stop :], values[..., demos.stop :, :, :])
    return before + after, inside
