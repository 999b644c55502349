"""Checks of arguments shared by the statistics, and the one way a seed is turned into a generator."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt_lens._errors import NonFiniteError, OptionError
from metaopt_lens.dual import is_finite

Seed = int | torch.Generator


def as_generator(seed: Seed) -> torch.Generator:
    """A generator as given, or a fresh one on the CPU seeded with the number."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def check_finite(**tensors: Tensor) -> None:
    """Raise `NonFiniteError` naming the first argument that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"{name} must be finite, but {bad} of its {tensor.numel()} entries are NaN or infinite: "
                "leave out the damaged queries, or record them again in higher precision."
            )


def check_same_shape(**tensors: Tensor) -> None:
    """Raise `OptionError` unless all arguments have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        came = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise OptionError(f"arguments of one shape are needed, got {came}: pass the same queries and layers.")


def check_positive(**numbers: int) -> None:
    """Raise `OptionError` naming the first count that is not at least 1."""
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}.")
