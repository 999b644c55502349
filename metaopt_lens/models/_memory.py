"""Whether a model fits, before it is loaded."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch

from metaopt_lens._errors import ModelTooLargeError

_GIB = 2**30


def check_memory(n_values: int, dtype: torch.dtype, device: str | None, *, what: str) -> None:
    """Raise `ModelTooLargeError` where weights alone take more memory than there is.

    The estimate is a lower bound (weights in `dtype`, no activations), so that nothing that fits is refused.

    Args:
        n_values: how many numbers the weights are.
        dtype: the type they will have.
        device: where they will be; None for where TransformerLens puts a model.
        what: the model, for the message.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    needed, available = n_values * dtype.itemsize, available_memory(place)
    if needed > available:
        name = str(dtype).removeprefix("torch.")
        raise ModelTooLargeError(
            f"{what} does not fit: {n_values:,} weights in {name} take {needed / _GIB:.1f} GiB, and {place.type} has "
            f"{available / _GIB:.1f} GiB available. Free memory, or load a smaller model"
            + (", or use bfloat16." if dtype.itemsize > 2 else ".")
        )


def available_memory(place: torch.device) -> int:
    """Bytes that can be allocated there now."""
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def count_values(folder: Path) -> int:
    """Numbers in a folder's weight files: exact for safetensors, for ``.bin`` the least they can be (four bytes each).

    A damaged file counts as empty: what is wrong with it, loading says.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return sum(_values_of(file) for file in files)
    return sum(file.stat().st_size // 4 for file in folder.glob("*.bin"))


def _values_of(file: Path) -> int:
    with file.open("rb") as handle:
        try:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(min(length, file.stat().st_size)))
            return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, TypeError, KeyError, AttributeError):
            return 0
