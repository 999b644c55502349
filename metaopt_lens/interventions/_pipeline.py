"""The stages of one intervention, or of several, as one list of hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from metaopt_lens._errors import OptionError
from metaopt_lens.interventions._change import Change
from metaopt_lens.interventions._sight import Sight
from metaopt_lens.models import Hook, LensModel, refuse_momentum, wrap
from metaopt_lens.runs import acting, acting_now


def pipeline(model: LensModel, changes: Sequence[Change]) -> list[Hook]:
    """Hooks that make all changes, in the order of the stages; see `Change`.

    Args:
        model: a wrapped model.
        changes: of its interventions.

    Raises:
        OptionError: several memories at once, a visibility under momentum that is on already, or an addition under a
            visibility that is.
    """
    plain = [hook for change in changes for hook in change.hooks]
    visibilities = [change.visibility for change in changes if change.visibility is not None]
    additions = [change.addition for change in changes if change.addition is not None]
    for visibility in visibilities:
        refuse_momentum(model, visibility.name)
    if additions and (names := acting_now(model)):
        raise OptionError(
            f"{names[-1]} is applied to {model.info.name} already, and what is added to z (momentum attention) must be "
            "told of it: give both to the same intervene(model, ...)."
        )
    at_z = {id(model.hook_points[model.hook_name("z", layer)]) for layer in range(model.info.n_layers)}

    def is_at_z(hook: Hook) -> bool:
        return hook[0] in model.hook_points and id(model.hook_points[hook[0]]) in at_z

    hooks = [hook for hook in plain if not is_at_z(hook)]
    if visibilities or additions:
        sight = Sight(model, visibilities)
        hooks += [*sight.hooks(), *acting(model, [visibility.name for visibility in visibilities])]
        for addition in additions:
            hooks += addition(model, sight)
    return [*hooks, *(hook for hook in plain if is_at_z(hook))]


class Staged(ABC):
    """The base of interventions that say their `change`: alone, each is the hooks of a pipeline of one."""

    @abstractmethod
    def change(self, model: LensModel) -> Change:
        """What it does to this model, stage by stage; raises if it was made for another.

        Args:
            model: a wrapped model.
        """

    def hooks(self, model: Any) -> list[Hook]:
        """The hooks that make the change alone; raises as `change` does.

        Args:
            model: the host or wrapped model that the hooks are for.
        """
        wrapped = wrap(model)
        return pipeline(wrapped, [self.change(wrapped)])
