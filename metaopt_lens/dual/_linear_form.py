"""The relaxed linear form of the split: equations 7-10 of arXiv:2212.10559 (docs/theory.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual._weighted import at_least_float32, split_sources

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


@dataclass(frozen=True, eq=False)
class LinearParts:
    """``F(q) = W_ZSL q + dW_ICL q``: linear attention, no softmax and no scale.

    Attributes:
        zero_shot: ``W_ZSL q = sum_{i in Z} v_i (k_i . q)``.
        meta_gradient: ``dW_ICL q = sum_{i in D} v_i (k_i . q)``.
    """

    zero_shot: Float[Tensor, "*batch head d_head"]
    meta_gradient: Float[Tensor, "*batch head d_head"]

    @property
    def total(self) -> Float[Tensor, "*batch head d_head"]:
        """``F(q)``, both parts together."""
        return self.zero_shot + self.meta_gradient


def linear_weights(
    q: Float[Tensor, "*batch dst head d_head"],
    k: Float[Tensor, "*batch src kv_head d_head"],
    visible: Bool[Tensor, "*rows dst src"],
) -> Float[Tensor, "*batch head dst src"]:
    """The relaxed form's weights ``k_i . q_j``: no softmax, no scale, 0 where the source is not visible.

    Args:
        q: query vectors as the scores see them (rotated).
        k: keys as the scores see them, of all sources.
        visible: which sources each destination sees (causal and window mask).
    """
    query = rearrange(at_least_float32(q), "... dst (kv group) d -> ... kv group dst d", kv=k.shape[-2])
    key = rearrange(at_least_float32(k), "... src kv d -> ... kv 1 d src")
    scores = rearrange(query @ key, "... kv group dst src -> ... (kv group) dst src")
    return scores.masked_fill(~visible[..., None, :, :], 0.0)


def split_linear(
    q: Float[Tensor, "*batch dst head d_head"],
    k: Float[Tensor, "*batch src kv_head d_head"],
    v: Float[Tensor, "*batch src kv_head d_head"],
    visible: Bool[Tensor, "*rows dst src"],
    demos: TokenSpan,
) -> LinearParts:
    """Apply W_ZSL and dW_ICL of every head to its query vector, without forming the matrices.

    Args:
        q: query vectors as the scores see them (rotated).
        k: keys as the scores see them, of all sources.
        v: values of all sources.
        visible: which sources each destination sees (causal and window mask).
        demos: the demonstrations' source positions.

    Returns:
        `LinearParts` with shapes ``[*batch, dst, head, d_head]``.
    """
    zero_shot, meta_gradient = split_sources(linear_weights(q, k, visible), v, demos)
    return LinearParts(zero_shot=zero_shot, meta_gradient=meta_gradient)


def linear_memory(
    keys: Float[Tensor, "*batch src d_head"], values: Float[Tensor, "*batch src d_head"]
) -> FactoredMatrix:
    """``W = sum_i v_i (x) k_i`` kept factored, for column vectors: ``W.AB @ q`` is linear attention over the sources.

    With the demonstrations' keys and values this is dW_ICL, with the others' W_ZSL (eq. 9 and 10); its rank is at
    most ``min(d_head, src)``.

    Args:
        keys: keys of the sources, as the scores see them.
        values: values of the same sources.
    """
    from transformer_lens import FactoredMatrix

    return FactoredMatrix(values.mT, keys)
