"""A fingerprint of every weight of a model, so that what was made with it is not applied to other weights."""

from __future__ import annotations

from itertools import zip_longest

from torch import Tensor

from metaopt_lens._errors import ModelMismatchError
from metaopt_lens.models._checksum import checksum
from metaopt_lens.models._info import ModelInfo
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


def check_made_for(model: LensModel, made_for: ModelInfo, fingerprint: Fingerprint, *, what: str, again: str) -> None:
    """Raise `ModelMismatchError` unless something was made for this model, with these weights, in this dtype.

    Args:
        model: the wrapped model it is to be used with.
        made_for: the model it was made for.
        fingerprint: of that model's weights.
        what: what it is and how it was made, as in ``"this patch was compiled for"``.
        again: how to make it again.
    """
    model.check_same(made_for, " ".join(what.split()[:2]))
    for fact in ("architecture", "positions", "dtype"):
        mine, theirs = getattr(made_for, fact), getattr(model.info, fact)
        if mine != theirs:
            raise ModelMismatchError(
                f"{what} {made_for.name} ({fact} = {mine}); {model.info.name} has {fact} = {theirs}. "
                f"Make it again with {again}."
            )
    differs = _first_difference(fingerprint, fingerprint_of(model))
    if differs is not None:
        raise ModelMismatchError(
            f"{what} other weights than those of {model.info.name} ({differs} differs): make it again with {again}."
        )


def _first_difference(mine: Fingerprint, theirs: Fingerprint) -> str | None:
    """The first parameter that is not the same to the bit; None if all are."""
    for (name, value), (other, found) in zip_longest(mine, theirs, fillvalue=("", 0)):
        if (name, value) != (other, found):
            return name or other
    return None
