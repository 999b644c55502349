"""A griffe extension: ``low, high: ends of the interval`` in a docstring's list is one entry for each name.

Griffe reads a type into everything after the first name, which the site would show as "low, (high)".
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_GROUP = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +\S.*)*)$", re.MULTILINE)
_LISTS = re.compile(r"^( *)(?:Args|Attributes):\n(?:\1 +.*\n?|\n)+", re.MULTILINE)


class GroupedNames(griffe.Extension):
    """Splits grouped names before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)


def split_names(docstring: str) -> str:
    """The docstring with an entry for each name of a group in ``Args:`` and ``Attributes:``."""

    def entries(match: re.Match[str]) -> str:
        indent, names, text = match.groups()
        return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))

    return _LISTS.sub(lambda part: _GROUP.sub(entries, part[0]), docstring)
