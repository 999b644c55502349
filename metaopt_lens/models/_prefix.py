"""Keys and values of tokens that were run once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of tokens that were run once and are shared by many continuations.

    Attributes:
        k: per layer, keys as the scores see them.
        v: per layer, values.
        host_k: per layer, keys as the host's own cache holds them (unrotated on a HookedTransformer).
    """

    k: tuple[Float[Tensor, "pos kv_head d_head"], ...]
    v: tuple[Float[Tensor, "pos kv_head d_head"], ...]
    host_k: tuple[Float[Tensor, "pos kv_head d_head"], ...]

    @property
    def n_tokens(self) -> int:
        """How many tokens the prefix holds."""
        return int(self.k[0].shape[0])

    def truncate(self, n_tokens: int) -> Prefix | None:
        """The first `n_tokens` of the prefix (causal: they do not depend on what follows); None for 0.

        Args:
            n_tokens: how many tokens remain.
        """
        if n_tokens == 0:
            return None
        return replace(
            self,
            k=tuple(t[:n_tokens] for t in self.k),
            v=tuple(t[:n_tokens] for t in self.v),
            host_k=tuple(t[:n_tokens] for t in self.host_k),
        )
