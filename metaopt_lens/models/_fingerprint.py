"""A fingerprint of every weight of a model, so that what was made with it is not applied to other weights."""

from __future__ import annotations

from itertools import zip_longest

from torch import Tensor

from metaopt_lens.models._checksum import checksum
from metaopt_lens.models._lens import LensModel

# Of every parameter: its name and a checksum of its bits.
Fingerprint = tuple[tuple[str, int], ...]


def fingerprint_of(model: LensModel) -> Fingerprint:
    """Of every parameter its name and checksum. Computed every time: weights can be changed behind any cache.

    Args:
        model: a wrapped model.
    """
    found: dict[str, Tensor] = {}
    for root in model.adapter.roots:
        found |= dict(root.named_parameters())
    return tuple((name, int(checksum(found[name]))) for name in sorted(found))


def first_difference(mine: Fingerprint, theirs: Fingerprint) -> str | None:
    """The first parameter that is not the same to the bit; None if all are.

    Args:
        mine: one model's fingerprint.
        theirs: another's.
    """
    for (name, value), (other, found) in zip_longest(mine, theirs, fillvalue=("", 0)):
        if (name, value) != (other, found):
            return name or other
    return None
