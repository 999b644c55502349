"""What a bridge's norms multiply with, add, and divide by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt_lens.models._fixed_norm import FixedNorm


def gain_of(norm: Any, cfg: Any) -> Tensor | None:
    """The factor a norm puts on its normalised input; None without a norm or without a learnable one."""
    weight: Tensor | None = None if norm is None else getattr(norm.original_component, "weight", None)
    if weight is None:
        return None
    return 1.0 + weight if getattr(cfg, "rmsnorm_uses_offset", False) else weight  # Gemma stores it as an offset


def fixed_norm(norm: Any, cfg: Any) -> FixedNorm:
    """A bridge's norm as a linear map with a scale."""
    inner = norm.original_component
    return FixedNorm(
        kind="RMS" if norm.uses_rms_norm else "LN",
        # Under the root; transformers calls it one thing or the other.
        eps=float(inner.variance_epsilon if "variance_epsilon" in vars(inner) else inner.eps),
        gain=gain_of(norm, cfg),
        bias=getattr(inner, "bias", None),
    )
