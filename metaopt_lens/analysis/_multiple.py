"""Multiple comparisons: many layers and heads are tested at once."""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError


def adjust_p_values(
    p: Float[Tensor, "*item"], *, method: Literal["benjamini-hochberg", "holm"] = "benjamini-hochberg"
) -> Float[Tensor, "*item"]:
    """Adjusted p values, to be compared with the level wanted for all comparisons together.

    ``benjamini-hochberg`` bounds the share of false discoveries (tests independent or positively dependent);
    ``holm`` bounds the probability of any false discovery, whatever the dependence.

    Args:
        p: p values of all comparisons.
        method: the correction.
    """
    flat = p.detach().cpu().double().flatten()
    if not bool(((flat >= 0) & (flat <= 1)).all()):
        raise OptionError("p values must lie between 0 and 1, but some are outside or NaN: leave undefined tests out.")
    if method == "benjamini-hochberg":
        from scipy.stats import false_discovery_control

        adjusted = torch.from_numpy(false_discovery_control(flat.numpy())) if len(flat) else flat
    elif method == "holm":
        ordered, order = flat.sort()
        steps = torch.arange(len(flat), 0, -1)
        stepped = torch.cummax(ordered * steps, 0).values.clamp_max(1) if len(flat) else ordered
        adjusted = torch.empty_like(flat).scatter_(0, order, stepped)
    else:
        assert_never(method)
    return adjusted.reshape(p.shape).to(p.device)
