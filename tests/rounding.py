"""Tolerances in units of rounding: k x eps(dtype) x the largest magnitude compared.

Two ways to compute the same numbers (a row alone or in a batch, a whole prompt or its end behind a cache, another
kernel on another processor) differ by their rounding, and rounding grows with the numbers' size and with the depth of
the computation. An absolute tolerance knows neither: it is too strict for large numbers and says nothing about small
ones. So k is counted in steps:

- STEP: a sum of up to 64 products, as all are in the small models (width 32, MLP 48, up to 40 tokens). In another order
  it differs by about sqrt(64) / 2 units of its largest partial sum.
- SUM: a result and the sum of its parts, or a projection written out: two steps, of numbers about twice the result.
- PASS: logits, or z, keys and pattern of any layer, from token ids: three layers of six steps (norm, projection, scores
  and softmax, weighted values, W_O, MLP), each passing on what came before it.

Measured, with PyTorch's three instruction sets and two of MKL's, one sum is up to 4 units off and a pass 1 to 17, but
for two families: a score of size s is rounded by s units, which is a relative error of a probability. Gemma's scores
reach 40 (up to 50 units seen behind a prefix), and Gemma 3 norms queries and keys, which sharpens in every layer (30
units in the pattern). `of_pass` gives these four times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 4
SUM = 4 * STEP
PASS = 3 * 6 * STEP

_SHARP = {"bridge:gemma", "bridge:gemma3"}


def of_pass(name: str) -> int:
    """Units for a pass of the small model called `name` (see `hosts`)."""
    return 4 * PASS if name in _SHARP else PASS


def rounding(units: float, *compared: Tensor | float, dtype: torch.dtype = torch.float32) -> float:
    """So many units of rounding of the largest finite magnitude among `compared`; `dtype` is computed in."""
    sizes = [torch.as_tensor(x).detach().abs() for x in compared]
    largest = max((float(x[x.isfinite()].max()) for x in sizes if x.isfinite().any()), default=0.0)
    return units * torch.finfo(dtype).eps * largest


def assert_agree(
    actual: Tensor,
    expected: Tensor,
    units: float,
    *,
    of: tuple[Tensor | float | None, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """`actual` is `expected` up to rounding; `of` are the terms, where both are what is left of larger numbers."""
    terms = [x for x in of if x is not None]
    tolerance = rounding(units, actual, expected, *terms, dtype=dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=False)
