"""The least an intervention has to be. One that acts by stages: `metaopt_lens.interventions.Change`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._lens import LensModel


@runtime_checkable
class Intervention(Protocol):
    """A change to a model that is nothing but hooks: a weight update, a meta-gradient, a knock-out, momentum, yours."""

    def hooks(self, model: LensModel) -> list[Hook]:
        """The hooks that make the change; raises if it was made for another model.

        Args:
            model: the wrapped model that the hooks are for.
        """
        ...
