"""Forward passes, the user's and our own: where the tokens stand, and what was computed before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.models._prefix import Prefix

# In a list of hooks: the function is called with the `HostPass` before every forward pass.
PASS = "forward pass"

PastKeysValues = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
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
        return _behind(self.past(layer)[1], v)

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


@dataclass(frozen=True, eq=False)
class Standing:
    """Where the tokens of a running pass stand, and the keys and values of those before it.

    Attributes:
        positions: of every slot, cached ones included: the same for all sequences, or a row for each.
        n_past: how many slots were computed before this pass.
        past: per layer, their keys and values; keys are None where the hooks show them too.
        valid: which slots hold a token; None where all do.
        moved: whether the host computes with other positions than its own.
    """

    positions: Int[Tensor, "*rows slot"]
    n_past: int
    past: Callable[[int], PastKeysValues]
    valid: Bool[Tensor, "batch slot"] | None = None
    moved: bool = False

    @classmethod
    def behind(cls, prefix: Prefix | None, n_new: int, device: torch.device) -> Standing:
        """A pass of our own: unpadded or padded on the right, behind a shared prefix if there is one."""
        n_past = 0 if prefix is None else prefix.n_tokens

        def past(layer: int) -> PastKeysValues:
            return (None, None) if prefix is None else (prefix.k[layer][None], prefix.v[layer][None])

        return cls(torch.arange(n_past + n_new, device=device), n_past, past)

    @classmethod
    def of(cls, host_pass: HostPass, moved: Int[Tensor, "batch slot"] | None) -> Standing:
        """A pass of the host, its tokens moved to these positions if there are any."""
        positions = host_pass.index if moved is None else moved
        return cls(positions, host_pass.n_past, host_pass.past, host_pass.valid, moved is not None)

    @property
    def new_positions(self) -> Int[Tensor, "*rows pos"]:
        """Positions of the tokens of this pass."""
        return self.positions[..., self.n_past :]

    def all_keys(self, layer: int, k: Tensor, n_new: int) -> Float[Tensor, "batch src kv_head d_head"]:
        """The new tokens' keys behind those computed before, unless `k` holds these already."""
        return _behind(self.past(layer)[0], k) if k.shape[1] == n_new else k

    def all_values(self, layer: int, v: Tensor) -> Float[Tensor, "batch src kv_head d_head"]:
        """The new tokens' values behind those computed before."""
        return _behind(self.past(layer)[1], v)


def _behind(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past.to(new).expand(len(new), -1, -1, -1), new], dim=1)
