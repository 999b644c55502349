"""Whether two models have the same weights."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from metaopt_lens.models._lens import LensModel

# Of every parameter: its name and two sums.
Fingerprint = tuple[tuple[str, float, float], ...]


def fingerprint_of(model: LensModel) -> Fingerprint:
    """Of every parameter its name, its sum, and a sum of squares with weights that tell places apart; in float64."""
    found: dict[str, Tensor] = {}
    for root in model.adapter.roots:
        found |= dict(root.named_parameters())
    sums = []
    for name, parameter in sorted(found.items()):
        flat = parameter.detach().flatten()
        some = flat[::7].double()
        places = torch.arange(1, len(some) + 1, dtype=torch.float64, device=some.device)
        sums.append((name, flat.sum(dtype=torch.float64), (some.square() * places).sum() / max(len(some), 1)))
    return tuple((name, float(total), float(squares)) for name, total, squares in sums)


def first_difference(mine: Fingerprint, theirs: Fingerprint) -> str | None:
    """The first parameter that is not the same, to the rounding of sums in another order; None if all are."""
    for (name, *values), (other, *others) in zip_longest(mine, theirs, fillvalue=("", 0.0, 0.0)):
        if name != other:
            return name or other
        if any(abs(a - b) > 1e-9 * max(abs(a), 1.0) for a, b in zip(values, others, strict=True)):
            return name
    return None
