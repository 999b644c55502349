"""How results draw themselves without importing what draws.

`metaopt_lens.viz` marks its functions with `draws` when it is imported; a result's method calls `draw`, which finds the
function by the result's class. The package's root says what to import when nothing has been drawn yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_FUNCTIONS: dict[tuple[type, str], Callable[..., Any]] = {}
_LOADERS: list[Callable[[], Any]] = []


def draws(kind: type, method: str) -> Callable[[_Function], _Function]:
    """Mark a function as what draws a method of a class.

    Args:
        kind: the class of the results.
        method: the method's name, such as ``"plot"``.

    Returns:
        A decorator that gives the function back as it is.
    """

    def mark(function: _Function) -> _Function:
        _FUNCTIONS[kind, method] = function
        return function

    return mark


def load_with(load: Callable[[], Any]) -> None:
    """Say what imports the functions that draw; it is called before the first picture.

    Args:
        load: imports a package whose functions are marked with `draws`.
    """
    _LOADERS.append(load)


def draw(result: Any, method: str, *arguments: Any) -> Any:
    """Draw a result with the function marked for its class.

    Args:
        result: what to draw; a subclass is drawn like its class.
        method: the method that was called.
        arguments: passed on.

    Returns:
        What the function returns.

    Raises:
        LookupError: no function draws that class (a mistake in the package).
    """
    for load in _LOADERS:
        load()
    for kind in type(result).__mro__:
        if (kind, method) in _FUNCTIONS:
            return _FUNCTIONS[kind, method](result, *arguments)
    raise LookupError(f"nothing draws {type(result).__name__}.{method}: mark a function with @draws.")
