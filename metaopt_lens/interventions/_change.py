"""What an intervention says it does, stage by stage: see `Change`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens.models import Hook, HostPass, LensModel

if TYPE_CHECKING:
    from metaopt_lens.interventions._sight import Sight


@dataclass(frozen=True, eq=False)
class Memory:
    """Keys and values that heads see besides those of the running pass.

    Attributes:
        k: keys as the scores see them, rotated to `positions`.
        v: values.
        positions: where they stand.
        strength: factor on the change of z they make.
        linear: add ``scale sum_i v_i (k_i . q)`` instead of joining the softmax.
        scale: of the linear form; None for the layer's score scale over the number of sources.
    """

    k: Float[Tensor, "layer src kv_head d_head"]
    v: Float[Tensor, "layer src kv_head d_head"]
    positions: Int[Tensor, " src"]
    strength: float = 1.0
    linear: bool = False
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which sources some heads see, where that is not what the model's own mask says.

    Attributes:
        name: of the intervention with its article, for messages ("a knock-out").
        heads: the heads it is about.
        place: if given, called before every pass, to refuse one that it does not fit; returns where every slot of the
            pass is to stand, ``[batch, slot]``, or None to leave the tokens (of all heads) where they are.
        hidden: given a pass, the slots that the heads do not see, ``[batch, dst, slot]``; None hides nothing. No token
            may be left without any source.
        memory: what the heads see besides.
    """

    name: str
    heads: Bool[Tensor, "layer head"]
    place: Callable[[HostPass], Tensor | None] | None = None
    hidden: Callable[[HostPass], Tensor] | None = None
    memory: Memory | None = None


# Given the model and what its heads see: the hooks that add something to z (or replace it).
Addition = Callable[[LensModel, "Sight"], Sequence[Hook]]


@dataclass(frozen=True, eq=False)
class Change:
    """What one intervention does to a model. All that are given to one `intervene` act together, stage by stage.

    1. `hooks`, in the order given: on weights and their products (queries, keys, values, outputs, MLPs) and on the
       residual stream. Those at z come last of all: they see what the heads put out in the end.
    2. `visibility`: what of these queries, keys and values the heads see. What one hides is hidden, whatever the others
       say; at most one brings a memory.
    3. `addition`: what is added to z; it is told what the heads see.

    Stages 2 and 3 do not depend on the order in which interventions are given.
    """

    hooks: Sequence[Hook] = ()
    visibility: Visibility | None = None
    addition: Addition | None = None


@runtime_checkable
class StagedIntervention(Protocol):
    """An intervention of any stage. One that is hooks and nothing more needs only ``hooks(model)`` (`Intervention`)."""

    def change(self, model: LensModel) -> Change:
        """What it does to this model; raises if it was made for another.

        Args:
            model: a wrapped model.
        """
        ...
