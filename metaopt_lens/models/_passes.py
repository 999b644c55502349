"""Forward passes the user makes on the host: padded, cached, generating; seen with the position of every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.dual import ScoreRule, attention_scores, softmax_with_sink, weighted_values

# In a list of hooks: the function is called with the `HostPass` before every forward pass.
PASS = "forward pass"

PastKeysValues = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class HostPass:
    """One forward pass as the host was asked for it; a slot is a column of the batch, cached ones included.

    Attributes:
        tokens: ids of the new tokens; None where the host was given embeddings.
        valid: which slots hold a token; the others are padding.
        n_past: how many slots the host's cache holds.
        past: per layer, keys and values in the host's cache, ``[batch, past, kv_head, d_head]``; keys are None where
            the hooks show the cached ones too. A sliding cache holds the last slots only.
    """

    tokens: Int[Tensor, "batch pos"] | None
    valid: Bool[Tensor, "batch slot"]
    n_past: int
    past: Callable[[int], PastKeysValues]

    @property
    def index(self) -> Int[Tensor, "batch slot"]:
        """Position of every slot among its sequence's tokens (0 for padding on the left)."""
        return (self.valid.long().cumsum(1) - 1).clamp_min(0)

    def all_values(self, layer: int, v: Tensor) -> Float[Tensor, "batch slot kv_head d_head"]:
        """The new tokens' values behind those in the host's cache."""
        past = self.past(layer)[1]
        return v if past is None else torch.cat([past.to(v), v], dim=1)

    def sources(self, layer: int, values: Tensor) -> tuple[Int[Tensor, "batch slot"], Bool[Tensor, "batch slot"]]:
        """Positions of all values (see `all_values`), and which are no padding.

        Raises:
            UnsupportedModelError: the cache has forgotten some.
        """
        index, valid = (t.to(values.device) for t in (self.index, self.valid))
        if values.shape[1] != index.shape[1]:
            raise UnsupportedModelError(
                f"the cache of layer {layer} no longer holds all past tokens (sliding window), and momentum needs "
                "them all: run the whole sequence in one pass."
            )
        return index, valid


@dataclass(frozen=True)
class PlacedCall:
    """One layer's attention in any forward pass of the host, seen just before W_O.

    Attributes:
        q, k: as the scores see them, keys of the cached tokens included.
        v: values; z: the heads' outputs before W_O.
        rule: how the layer scores.
        dst_positions, src_positions: where the tokens stand.
        valid: sources that are no padding.
    """

    layer: int
    q: Float[Tensor, "batch dst head d_head"]
    k: Float[Tensor, "batch src kv_head d_head"]
    v: Float[Tensor, "batch src kv_head d_head"]
    z: Float[Tensor, "batch dst head d_head"]
    rule: ScoreRule
    dst_positions: Int[Tensor, "batch dst"]
    src_positions: Int[Tensor, "batch src"]
    valid: Bool[Tensor, "batch src"]

    def scores(self) -> Float[Tensor, "batch head dst src"]:
        """Final scores; ``-inf`` for what is not visible. Padding sees itself, so that no row is empty."""
        scores = attention_scores(
            self.rule, self.q, self.k, dst_positions=self.dst_positions, src_positions=self.src_positions
        )
        n_dst, n_src = self.q.shape[1], self.k.shape[1]
        itself = torch.ones(n_dst, n_src, dtype=torch.bool, device=scores.device).triu(n_src - n_dst)
        itself = itself.tril(n_src - n_dst)
        return scores.masked_fill(~(self.valid[:, None, :] | itself)[:, None], -torch.inf)

    def attend(self, scores: Float[Tensor, "batch head dst src"]) -> Float[Tensor, "batch dst head d_head"]:
        """The heads' outputs under these scores, in the dtype of z."""
        pattern, _ = softmax_with_sink(scores, self.rule.sinks)
        return weighted_values(pattern, self.v).to(self.z.dtype)
