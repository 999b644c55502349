"""Whether a tensor holds NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: one pass, as NaN passes through minimum and maximum.

    Args:
        tensor: any tensor.
    """
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
