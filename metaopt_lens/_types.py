"""Small shared value types, and the glossary of axis names used in jaxtyping shapes.

Axis names, one meaning each throughout the package:

==============  ==============================================================================
``layer``       transformer block
``head``        attention (query) head
``kv_head``     key-value head; equals ``head`` without grouped-query attention
``d_head``      size of one head
``d_model``     width of the residual stream
``pos``         token position in a sequence
``src``         source position (a key), in the full in-context prompt
``dst``         destination position (a query)
``demo``        demonstration
``batch``       sequences run together
``query``       queries (prompts) asked behind the same demonstrations
``item``        label-free stand-in for any leading axis of statistics (queries, sets, draws)
==============  ==============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from metaopt_lens._errors import HeadError, SpanError

_HEAD = re.compile(r"L(\d+)H(\d+)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class HeadRef:
    """One attention head, written ``L3H7`` (layer 3, head 7, both counted from 0)."""

    layer: int
    head: int

    @classmethod
    def parse(cls, text: str) -> HeadRef:
        """Read ``"L3H7"``; raises `HeadError` for anything else.

        Args:
            text: layer and head, as in ``"L3H7"``.
        """
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise HeadError(f"cannot read {text!r} as a head: write layer and head as in 'L3H7'.")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, head: str | HeadRef | Sequence[int]) -> HeadRef:
        """A head in any of its forms: itself, ``"L3H7"`` or ``(3, 7)``; raises `HeadError` for anything else.

        Args:
            head: the head in one of its forms.
        """
        match head:
            case HeadRef():
                return head
            case str():
                return cls.parse(head)
            case (int(layer), int(number)):
                return cls(layer, number)
            case _:
                raise HeadError(f"cannot read {head!r} as a head: write 'L3H7' or (3, 7), layer and head.")

    def check(self, n_layers: int, n_heads: int) -> HeadRef:
        """Return self, or raise `HeadError` naming the valid ranges.

        Args:
            n_layers: layers of the model.
            n_heads: heads of each layer.
        """
        if not (0 <= self.layer < n_layers and 0 <= self.head < n_heads):
            raise HeadError(
                f"there is no head {self}: the model has layers 0 to {n_layers - 1} with heads 0 to {n_heads - 1}."
            )
        return self

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True, order=True)
class TokenSpan:
    """Half-open range of token positions, ``start <= i < stop``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise SpanError(f"a span needs 0 <= start <= stop, got {self.start} and {self.stop}.")

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.stop

    @property
    def slice(self) -> slice:
        """The span as a Python slice."""
        return slice(self.start, self.stop)
