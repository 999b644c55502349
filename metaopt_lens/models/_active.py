"""Momentum attention that is on now: what reads z must know that it is not the attention pattern's alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from metaopt_lens._errors import OptionError
from metaopt_lens.models._abstract import AttentionModel
from metaopt_lens.models._hooks import Hook

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary()


@runtime_checkable
class MomentumTerm(Protocol):
    """An intervention that adds ``EMA_t = sum_{i<t} eta^(t-i) v_i`` to the outputs of heads."""

    def hooks(self, model: AttentionModel) -> list[Hook]:
        """The hooks that add it."""
        ...

    def etas(self, model: AttentionModel) -> Float[Tensor, "layer head"]:
        """eta of every head; 0 where nothing is added."""
        ...


@contextmanager
def announced_momentum(model: AttentionModel, eta: Float[Tensor, "layer head"] | None) -> Iterator[None]:
    """Within the block `active_momentum` knows of it. The hooks themselves are attached elsewhere."""
    if eta is None:
        yield
        return
    active = _ACTIVE.setdefault(model.host, [])
    active.append(eta)
    try:
        yield
    finally:
        active.pop()


def active_momentum(model: AttentionModel) -> Float[Tensor, "layer head"] | None:
    """eta of every head under all momentum attention that is on; None if none is."""
    active = _ACTIVE.get(model.host)
    return join_etas(active) if active else None


def join_etas(etas: list[Tensor]) -> Float[Tensor, "layer head"]:
    """One eta for every head out of several; raises `OptionError` where two act on one head."""
    joined = etas[0]
    for other in etas[1:]:
        both = ((joined != 0) & (other != 0)).nonzero().tolist()
        if both:
            layer, head = both[0]
            raise OptionError(f"two momentum attentions act on head L{layer}H{head}: give every head one eta.")
        joined = joined + other.to(joined)
    return joined


def refuse_momentum(model: AttentionModel, what: str) -> None:
    """Raise `OptionError` if momentum is on already: `what` computes z anew and would drop it."""
    if active_momentum(model) is not None:
        raise OptionError(
            f"momentum attention is on already, and {what} would undo it: give both to the same intervene(model, ...)."
        )
