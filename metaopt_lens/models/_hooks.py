"""Hooks as values: attach a list of (name, function) for the length of a ``with``, and nothing longer."""

from __future__ import annotations

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
# TransformerLens's own: called with the tensor and, by name, its hook point.
HostFunction = Callable[..., Any]


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


@dataclass(frozen=True, eq=False, repr=False)
class _Attached:
    """One of our functions as the host calls it; `functions_at` finds it at its hook point."""

    function: HookFunction

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG002 - the host passes it by name
        return self.function(tensor)


def as_host_hooks(hooks: Sequence[Hook]) -> list[tuple[str, HostFunction]]:
    """Our hooks as TransformerLens takes them (``fwd_hooks``), late ones last."""
    late = [hook for hook in hooks if isinstance(hook[1], Late)]
    return [(name, _Attached(function)) for name, function in [*(h for h in hooks if h not in late), *late]]


def from_host_hook(name: str, function: HostFunction, point: HookPoint) -> Hook:
    """A hook of TransformerLens's own as ours."""
    return name, lambda tensor: function(tensor, hook=point)


@contextmanager
def attached(hook_points: Mapping[str, HookPoint], hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach `hooks` and remove exactly these at the end, also after an exception or Ctrl-C.

    Hooks of the user's own stay where they are and fire first.
    """
    handles: list[tuple[Any, Any]] = []
    try:
        for name, function in hooks:
            point = hook_points[name]
            point.add_hook(_Attached(function))
            handles.append((point, point.fwd_hooks[-1]))
            for handle in point.fwd_hooks:
                if isinstance(_function_of(handle), Late):
                    point._forward_hooks.move_to_end(handle.hook.id)
        yield
    finally:
        for point, handle in reversed(handles):
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def functions_at(point: HookPoint) -> list[HookFunction]:
    """Our functions that are attached to a hook point now, in the order they were attached.

    Args:
        point: the hook point.
    """
    functions = [_function_of(handle) for handle in point.fwd_hooks]
    return [function for function in functions if function is not None]


def _function_of(handle: Any) -> HookFunction | None:
    hook = handle.user_hook
    return hook.function if isinstance(hook, _Attached) else None


def _modules(roots: Sequence[nn.Module]) -> set[nn.Module]:
    """All modules below these; `nn.Module.modules` takes ten times as long, as it also puts their names together."""
    found: set[nn.Module] = set()
    waiting: list[nn.Module | None] = list(roots)
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found.add(module)
            waiting.extend(module._modules.values())
    return found


@contextmanager
def inference_state(models: Sequence[nn.Module], *, grad: bool) -> Iterator[None]:
    """Run in eval mode, with or without gradients; every module's mode and the global grad state come back."""
    training = [module for module in _modules(models) if module.training]
    try:
        for module in training:
            module.training = False
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for module in training:
            module.training = True
