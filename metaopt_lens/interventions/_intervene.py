"""One context that composes interventions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metaopt_lens._errors import OptionError
from metaopt_lens.interventions._apply import AppliedMetaGradient
from metaopt_lens.interventions._knock_out import KnockOut
from metaopt_lens.interventions._meta_gradient import MetaGradient
from metaopt_lens.interventions._momentum import MomentumAttention, momentum_hooks
from metaopt_lens.interventions._momentum_share import with_meta_gradient, without_knocked_out
from metaopt_lens.models import Hook, Intervention, join_etas, wrap
from metaopt_lens.runs import acting

_READ_ATTENTION = (AppliedMetaGradient, MetaGradient, KnockOut)
_NAMES = {AppliedMetaGradient: "a meta-gradient", MetaGradient: "a meta-gradient", KnockOut: "a knock-out"}


@contextmanager
def intervene(model: Any, *interventions: Any, **options: Any) -> Iterator[Any]:
    """Within the block every forward pass of `model` has the interventions in it; afterwards it is what it was.

    They act in the order given, after hooks the model already had; meta-gradients and knock-outs act after the others,
    on what these (weight updates) made of queries, keys and values; momentum attention is added to what comes out: a
    meta-gradient brings the demonstrations' share of the moving average with it, a knock-out takes it away. The
    model's weights are not touched.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
        interventions: weight updates, meta-gradients, knock-outs, momentum attention.
        options: `form`, `heads`, `strength`, `scale` of the one meta-gradient given; see `MetaGradient.apply`.

    Raises:
        OptionError: nothing to intervene with, something that is not an intervention, several meta-gradients at once,
            options without a meta-gradient, two momentum attentions on one head, or a meta-gradient or knock-out under
            momentum that is on already.
        ModelMismatchError: an intervention was made for another model.
    """
    if not interventions:
        raise OptionError("intervene needs at least one intervention.")
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise OptionError(
                f"{type(intervention).__name__} is not an intervention: give weight updates, meta-gradients, "
                "knock-outs or momentum attention (anything with hooks(model))."
            )
    if options:
        if not any(isinstance(i, MetaGradient) for i in interventions):
            raise OptionError(
                f"the options {', '.join(options)} are those of a meta-gradient, and none was given: for anything "
                "else set them where the intervention is made."
            )
        interventions = tuple(i.apply(**options) if isinstance(i, MetaGradient) else i for i in interventions)
    if sum(isinstance(i, AppliedMetaGradient | MetaGradient) for i in interventions) > 1:
        raise OptionError(
            "only one meta-gradient can be applied at a time: each moves the tokens behind its own demonstrations. "
            "Make one meta-gradient of all demonstrations and select from it."
        )
    wrapped = wrap(model)
    hooks: list[Hook] = []
    others = [i for i in interventions if not isinstance(i, MomentumAttention)]
    for intervention in sorted(others, key=lambda i: isinstance(i, _READ_ATTENTION)):
        hooks += intervention.hooks(wrapped)
    momenta = [i for i in interventions if isinstance(i, MomentumAttention)]
    if momenta:
        eta = join_etas([i.etas(wrapped) for i in momenta])
        applied = [i.apply() if isinstance(i, MetaGradient) else i for i in others]
        corrections = [with_meta_gradient(i, eta) for i in applied if isinstance(i, AppliedMetaGradient)]
        corrections += [without_knocked_out(wrapped, i, eta) for i in others if isinstance(i, KnockOut)]
        hooks += momentum_hooks(wrapped, eta, corrections)
    hooks += acting(wrapped, [_NAMES[type(i)] for i in others if isinstance(i, _READ_ATTENTION)])
    with wrapped.hooked(hooks):
        yield model
