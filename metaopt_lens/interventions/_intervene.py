"""One context that composes interventions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metaopt_lens._errors import OptionError
from metaopt_lens.models import Hook, Intervention, wrap


@contextmanager
def intervene(model: Any, *interventions: Intervention) -> Iterator[Any]:
    """Within the block every forward pass of `model` has the interventions in it; afterwards it is what it was.

    They act in the order given, after hooks the model already had. The model's weights are not touched.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
        interventions: weight updates, meta-gradients, knock-outs, momentum attention.

    Raises:
        OptionError: nothing to intervene with.
        ModelMismatchError: an intervention was made for another model.
    """
    if not interventions:
        raise OptionError("intervene needs at least one intervention.")
    wrapped = wrap(model)
    hooks: list[Hook] = []
    for intervention in interventions:
        hooks += intervention.hooks(wrapped)
    with wrapped.hooked(hooks):
        yield model
