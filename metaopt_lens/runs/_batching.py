"""Batches by length, sized by memory, halved when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from metaopt_lens._errors import OptionError
from metaopt_lens.models import LensModel

Item = TypeVar("Item")
Result = TypeVar("Result")

_LARGEST_BATCH = 64
_SHARE_OF_FREE_MEMORY = 0.25  # the rest is for the host's own temporaries


def choose_batch_size(model: LensModel, *, n_new: int, n_prefix: int, n_read: int = 0) -> int:
    """How many sequences fit into a share of the free memory, by a rough count of bytes.

    Args:
        model: a wrapped model.
        n_new: tokens of a sequence.
        n_prefix: tokens of the prefix before it.
        n_read: positions of a sequence whose logits are read; 0 for passes without logits.
    """
    info = model.info
    width = 4 if info.dtype == "float32" else 8 if info.dtype == "float64" else 2
    n_all = n_new + n_prefix
    n_logits = n_read if n_read == 0 or model.exits_exactly else n_new
    logits = 3 * n_logits * info.d_vocab * max(width, 4)
    cache = 2 * info.n_layers * n_all * info.n_kv_heads * info.d_head * width
    scores = 4 * info.n_heads * n_new * n_all * 4
    activations = 16 * n_new * info.d_model * width
    budget = _SHARE_OF_FREE_MEMORY * _free_bytes(model.device)
    return max(1, min(_LARGEST_BATCH, int(budget // (logits + cache + scores + activations))))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def batches(
    items: Sequence[Item],
    length: Callable[[Item], int],
    run: Callable[[list[Item]], list[Result]],
    *,
    batch_size: int,
) -> Iterator[tuple[list[int], list[Result]]]:
    """Apply `run` to batches of items of similar length, one batch at a time.

    Batches are of about equal size. One that runs out of memory is halved and tried again, and later ones keep the
    smaller size.

    Args:
        items: what to run.
        length: of an item, in tokens.
        run: gives the results of a batch.
        batch_size: items run together, at most.

    Yields:
        Which items were run, and their results.

    Raises:
        OptionError: `batch_size` below 1.
        torch.OutOfMemoryError, RuntimeError: even a single item does not fit on the GPU, or in the computer's memory.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}.")
    n_batches = -(-len(items) // batch_size)
    batch_size = -(-len(items) // max(n_batches, 1))
    order = sorted(range(len(items)), key=lambda i: length(items[i]))
    start = 0
    while start < len(order):
        chosen = order[start : start + batch_size]
        try:
            outputs = run([items[i] for i in chosen])
        except RuntimeError as error:
            if batch_size == 1 or not _out_of_memory(error):
                raise
            batch_size = (batch_size + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield chosen, outputs
        start += len(chosen)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; the CPU's allocator has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def map_batches(
    items: Sequence[Item],
    length: Callable[[Item], int],
    run: Callable[[list[Item]], list[Result]],
    *,
    batch_size: int,
) -> list[Result]:
    """The results of `batches`, in the order of `items`."""
    found: dict[int, Result] = {}
    for chosen, outputs in batches(items, length, run, batch_size=batch_size):
        found.update(zip(chosen, outputs, strict=True))
    return [found[i] for i in range(len(items))]
