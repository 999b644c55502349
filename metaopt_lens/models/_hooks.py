"""Hooks as values: attach a list of (name, function) for the length of a ``with``, and nothing longer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt_lens._errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

# Called with a tensor; the one hook named `PASS`, with a `HostPass`.
HookFunction = Callable[[Any], Tensor | None]
Hook = tuple[str, HookFunction]

# Per hook point, the ids of the late hooks attached to it now.
_LATE: weakref.WeakKeyDictionary[HookPoint, list[int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Late:
    """A hook function that runs after all others at its hook point, also those attached later: it reads the outcome."""

    function: HookFunction

    def __call__(self, tensor: Any) -> Tensor | None:
        return self.function(tensor)


class StopForward(BaseException):
    """Ends a forward pass early. Not an `Exception`, so that no handler inside a model swallows it."""


def check_hook_names(hook_points: Mapping[str, HookPoint], names: Sequence[str], *, owner: str) -> None:
    """Raise `UnsupportedModelError` naming the first hook the model does not have.

    Needed because a TransformerBridge 3.x silently skips unknown names.
    """
    for name in names:
        if name not in hook_points:
            near = get_close_matches(name, hook_points, n=2)
            hint = f" (it has {' and '.join(near)})" if near else ""
            raise UnsupportedModelError(f"{owner} has no hook point {name!r}{hint}.")


@contextmanager
def attached(hook_points: Mapping[str, HookPoint], hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach `hooks` and remove exactly these at the end, also after an exception or Ctrl-C.

    Hooks of the user's own stay where they are and fire first.
    """
    handles: list[tuple[Any, Any]] = []
    try:
        for name, function in hooks:
            point = hook_points[name]
            point.add_hook(_adapt(function))
            handles.append((point, point.fwd_hooks[-1]))
            if isinstance(function, Late):
                _LATE.setdefault(point, []).append(handles[-1][1].hook.id)
            for late in _LATE.get(point, ()):
                point._forward_hooks.move_to_end(late)
        yield
    finally:
        for point, handle in reversed(handles):
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
            if handle.hook.id in _LATE.get(point, ()):
                _LATE[point].remove(handle.hook.id)


def _adapt(function: HookFunction) -> Callable[..., Tensor | None]:
    def hook_function(tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001 - the host passes it by name
        return function(tensor)

    return hook_function


@contextmanager
def inference_state(models: Sequence[nn.Module], *, grad: bool) -> Iterator[None]:
    """Run in eval mode, with or without gradients; every module's mode and the global grad state come back."""
    training = {module for model in models for module in model.modules() if module.training}
    try:
        for module in training:
            module.training = False
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for module in training:
            module.training = True
