"""Detect weight processing, which changes the split, dW and finetuning (docs/theory.md, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

FOLDED_NORMS = "folded norms"
FOLDED_VALUE_BIASES = "folded value biases"

# Column means of independent entries have the size ``rms(W) / sqrt(d_model)``; folding a LayerNorm takes them out.
_CENTRED = 0.1
# Row norms of independent matrices are not correlated; a gain folded into all of them is a factor they share.
_SHARED_GAIN, _STANDARD_ERRORS = 0.25, 5.0


def processing_of(
    *,
    host_says: bool,
    gains: Sequence[Tensor | None],
    projections: Callable[[], Sequence[Sequence[Tensor]]],
    value_biases: Sequence[Tensor | None],
    output_biases: Sequence[Tensor | None],
) -> tuple[str, ...]:
    """Name what was folded.

    A fold leaves norm gains of exactly 1, and so does a fresh initialisation. Folded norms are reported where, besides,
    the host says that it processed its weights, or the weights behind the norms show it: see `reads_a_folded_norm`.
    Value biases were folded where they are all exactly 0 and output biases are not.

    Args:
        host_says: the host keeps a record of having processed its weights.
        gains: each block's factor on the normed attention input; None where there is no learnable one.
        projections: gives, for every layer, the query, key and value matrices, ``[d_model, out]``.
        value_biases: each layer's.
        output_biases: each layer's.
    """
    found = []
    learnable = [gain.detach() for gain in gains if gain is not None]
    ones = bool(learnable) and all(bool((gain == 1).all()) for gain in learnable)
    if ones and (host_says or reads_a_folded_norm(projections())):
        found.append(FOLDED_NORMS)
    values = [b for b in value_biases if b is not None]
    outputs = [b for b in output_biases if b is not None]
    if values and not any(bool(b.any()) for b in values) and any(bool(b.any()) for b in outputs):
        found.append(FOLDED_VALUE_BIASES)
    return tuple(found)


def reads_a_folded_norm(projections: Sequence[Sequence[Float[Tensor, "d_model _"]]]) -> bool:
    """Whether matrices that read the same normed input were multiplied by its gain.

    Either their columns are centred (a folded LayerNorm), or the norms of their rows go together (any folded gain:
    row i of each is multiplied by the same number). In independent random matrices neither happens by chance.

    Args:
        projections: for every layer, matrices that read the same input.
    """
    matrices = [[m.detach().float() for m in layer] for layer in projections]
    means = [
        m.mean(0).square().mean().sqrt() * len(m) ** 0.5 / m.square().mean().sqrt() for row in matrices for m in row
    ]
    if float(torch.stack(means).mean()) < _CENTRED:
        return True
    shared, total, n_rows = 0.0, 0.0, 0
    for layer in matrices:
        logs = [m.norm(dim=1).clamp_min(1e-30).log() for m in layer]
        logs = [log - log.mean() for log in logs]
        n_rows += len(logs[0])
        for one, other in combinations(logs, 2):
            shared += float(one @ other)
            total += float(one.norm() * other.norm())
    correlation = shared / total if total else 0.0
    return bool(correlation > max(_SHARED_GAIN, _STANDARD_ERRORS / n_rows**0.5))
