"""Momentum attention that is on now: what reads z must know that it is not the attention pattern's alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.models._hooks import Hook, HookFunction, functions_at
from metaopt_lens.models._lens import LensModel


@runtime_checkable
class MomentumTerm(Protocol):
    """An intervention that adds ``EMA_t = sum_{i<t} eta^(t-i) v_i`` to the outputs of heads.

    Its hooks at z are `AddsMomentum`.
    """

    def hooks(self, model: LensModel) -> list[Hook]:
        """The hooks that add it.

        Args:
            model: the wrapped model that the hooks are for.
        """
        ...

    def etas(self, model: LensModel) -> Float[Tensor, "layer head"]:
        """eta of every head; 0 where nothing is added.

        Args:
            model: a wrapped model.
        """
        ...


@dataclass(frozen=True, eq=False, repr=False)
class AddsMomentum:
    """A hook function at z that adds a layer's moving average; `active_momentum` finds it on the model.

    Attributes:
        function: adds the average to z.
        eta: of every head of the layer.
    """

    function: HookFunction
    eta: Float[Tensor, " head"]

    def __call__(self, z: Tensor) -> Tensor | None:
        return self.function(z)


def active_momentum(model: LensModel) -> Float[Tensor, "layer head"] | None:
    """eta of every head under all momentum attention whose hooks are attached to the model now; None if there is none.

    Args:
        model: a wrapped model.

    Raises:
        OptionError: two act on one head.
    """
    found: list[list[Tensor]] = []
    for layer in range(model.info.n_layers):
        functions = functions_at(model.hook_points[model.hook_name("z", layer)])
        found.append([function.eta for function in functions if isinstance(function, AddsMomentum)])
    some = next((eta for etas in found for eta in etas), None)
    if some is None:
        return None
    nothing = torch.zeros_like(some, requires_grad=False)
    tables = [torch.stack([row.to(some) for row in rows]) for rows in zip_longest(*found, fillvalue=nothing)]
    return join_etas(tables)


def join_etas(etas: Sequence[Float[Tensor, "layer head"]]) -> Float[Tensor, "layer head"]:
    """One eta for every head out of several.

    Args:
        etas: one table per momentum attention.

    Raises:
        OptionError: two act on one head.
    """
    joined = etas[0]
    for other in etas[1:]:
        both = ((joined != 0) & (other != 0)).nonzero().tolist()
        if both:
            layer, head = both[0]
            raise OptionError(f"two momentum attentions act on head L{layer}H{head}: give every head one eta.")
        joined = joined + other.to(joined)
    return joined


def refuse_momentum(model: LensModel, what: str) -> None:
    """Raise `OptionError` if momentum is on already: `what` recomputes z and would drop it.

    Args:
        model: a wrapped model.
        what: what errors say is asked for.
    """
    if active_momentum(model) is not None:
        raise OptionError(
            f"momentum attention is on already, and {what} would undo it: give both to the same intervene(model, ...)."
        )
