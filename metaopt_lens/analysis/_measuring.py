"""What statistics are computed with besides what is read from runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from metaopt_lens.analysis._convention import Convention


@contextmanager
def timed(seconds: MutableMapping[str, float], name: str) -> Iterator[None]:
    """Add the time that the block takes.

    Args:
        seconds: by name; changed.
        name: what is timed.
    """
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


@dataclass(frozen=True, eq=False)
class Context:
    """What values and nulls are computed with besides the readings.

    Attributes:
        convention: of the published metrics.
        generator: of all random draws.
        n_draws: draws of a null per query.
        top_k: entries that count as top, at ``token`` and ``example`` level.
        d_model: width of the residual stream.
        subspace_dim: dimension of the singular subspaces.
        eps: rounding unit of the readings; None for that of their dtype.
        seconds: that each control took, filled in as they are run.
    """

    convention: Convention
    generator: torch.Generator
    n_draws: int
    top_k: Mapping[str, int]
    d_model: int
    subspace_dim: int = 4
    eps: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, int]:
        """What names and descriptions of statistics may mention in braces."""
        return {**self.top_k, "subspace_dim": self.subspace_dim}
