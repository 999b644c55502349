"""One context that composes interventions, and their hooks for TransformerLens's own calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.interventions._change import Change, StagedIntervention
from metaopt_lens.interventions._pipeline import pipeline
from metaopt_lens.models import (
    PASS,
    Hook,
    HostFunction,
    HostPass,
    Intervention,
    LensModel,
    active_momentum,
    as_host_hooks,
    check_hook_names,
    from_host_hook,
    wrap,
)


@contextmanager
def intervene(model: Any, *interventions: Any) -> Iterator[Any]:
    """Within the block every forward pass of `model` has the interventions in it; afterwards it is what it was.

    They act by stage, after hooks the model already had (see `Change`): first weight updates, changes of MLPs and
    residual stream and plain hooks, in the order given; then meta-gradients and knock-outs, on what these made of
    queries, keys and values; then momentum attention, which reads what the heads see: a meta-gradient brings the
    demonstrations' share of the moving average with it, a knock-out takes it away; last, plain hooks at z. But for
    hooks at one hook point, the order of the arguments does not matter. The model's weights are not touched.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
        interventions: weight updates, meta-gradients, knock-outs, momentum attention; lists of TransformerLens's own
            hooks, ``[(name, function)]``; and anything of yours with ``change(model)`` (`StagedIntervention`) or
            ``hooks(model)`` (`Intervention`).

    Raises:
        OptionError: nothing to intervene with, something that is no intervention, several meta-gradients at once, two
            momentum attentions on one head, a meta-gradient or knock-out under momentum that is on already, or
            momentum under one of these.
        ModelMismatchError: an intervention was made for another model.
        UnsupportedModelError: a hook point that the model does not have.
    """
    wrapped = wrap(model)
    with wrapped.hooked(_hooks(wrapped, interventions)):
        active_momentum(wrapped)  # refuses two on one head
        yield model


def fwd_hooks(
    model: Any, *interventions: Any, tokens: Int[Tensor, "batch pos"] | None = None
) -> list[tuple[str, HostFunction]]:
    """Hooks for TransformerLens's own ``model.run_with_hooks(tokens, fwd_hooks=...)`` (or ``model.hooks``).

    The pass computes what it computes within ``intervene(model, ...)``.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
        interventions: what `intervene` takes.
        tokens: ids of the one pass the hooks are for, without padding and without a cache; needed by what acts by
            position (knock-outs, momentum attention, function vectors), as hooks are not told where tokens stand.

    Raises:
        OptionError: as `intervene`; or an intervention acts by position, and `tokens` is not given; or it moves tokens
            (a meta-gradient), which no hook can.
    """
    wrapped = wrap(model)
    hooks = _hooks(wrapped, interventions)
    begins = [function for name, function in hooks if name == PASS]
    use_intervene = "within `with intervene(model, ...):` a plain model.run_with_hooks(...) works for all of them."
    if begins and tokens is None:
        raise OptionError(
            "one of these interventions acts by position, and hooks are not told where the tokens of a pass stand: "
            f"give fwd_hooks the tokens=... of the pass; {use_intervene}"
        )
    if begins and tokens is not None:
        ids = tokens.to(wrapped.device)
        whole = HostPass(ids, torch.ones_like(ids, dtype=torch.bool), 0, lambda _: (None, None))
        if any([begin(whole) is not None for begin in begins]):
            raise OptionError(f"a meta-gradient moves tokens to other positions, which no hook can: {use_intervene}")
        hooks.insert(0, _is_of(wrapped, tokens.shape))
    own = [hook for hook in hooks if hook[0] != PASS]
    check_hook_names(wrapped.hook_points, [name for name, _ in own], owner=wrapped.info.name)
    return as_host_hooks(own)


def _is_of(model: LensModel, shape: Sequence[int]) -> Hook:
    """A hook that refuses a pass of another shape."""

    def check(stream: Tensor) -> None:
        if stream.shape[:2] != tuple(shape):
            raise OptionError(
                f"these hooks are for one pass over tokens of shape {list(shape)}, this one has "
                f"{list(stream.shape[:2])}: make hooks for it with fwd_hooks(..., tokens=...)."
            )

    return model.residual_hook("pre", 0), check


def _hooks(model: LensModel, interventions: Sequence[Any]) -> list[Hook]:
    if not interventions:
        raise OptionError("intervene needs at least one intervention.")
    return pipeline(model, [_change(model, intervention) for intervention in interventions])


def _change(model: LensModel, given: Any) -> Change:
    """What is given, in any of the forms that are taken."""
    if isinstance(given, StagedIntervention):
        return given.change(model)
    if isinstance(given, Intervention):
        return Change(hooks=given.hooks(model))
    if isinstance(given, list | tuple) and all(map(_is_host_hook, given)):
        check_hook_names(model.hook_points, [name for name, _ in given], owner=model.info.name)
        return Change(hooks=[from_host_hook(name, function, model.hook_points[name]) for name, function in given])
    raise OptionError(
        f"{type(given).__name__} is no intervention: give weight updates, meta-gradients, knock-outs or momentum "
        "attention, a list of TransformerLens hooks [(name, function)], or anything with hooks(model) or change(model)."
    )


def _is_host_hook(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and callable(given[1])
