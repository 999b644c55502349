"""Detect weight processing, which changes the split, dW and finetuning (docs/theory.md, section 1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

FOLDED_NORMS = "folded norms"
FOLDED_VALUE_BIASES = "folded value biases"


def processing_of(
    *,
    folded_norms: bool,
    value_biases: Sequence[Tensor | None],
    output_biases: Sequence[Tensor | None],
) -> tuple[str, ...]:
    """Name what was folded: value biases that are all exactly 0 beside output biases that are not, were."""
    found = []
    if folded_norms:
        found.append(FOLDED_NORMS)
    values = [b for b in value_biases if b is not None]
    outputs = [b for b in output_biases if b is not None]
    if values and not any(bool(b.any()) for b in values) and any(bool(b.any()) for b in outputs):
        found.append(FOLDED_VALUE_BIASES)
    return tuple(found)
