"""A checksum of a tensor's bits, at the speed of reading it once."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

# Words in a row; prime, so that neither rows nor columns of a weight matrix fall on whole rows.
_ROW = 61


def checksum(tensor: Tensor) -> Int[Tensor, ""]:
    """``sum_r (2r + 1) sum_c word_rc`` modulo 2^64, the bits read as rows of 64-bit words.

    One changed number always changes it (odd numbers have inverses modulo 2^64), numbers that change places do unless
    they stay in one row.

    Args:
        tensor: of any dtype, shape and device.
    """
    flat = tensor.detach().flatten()
    if (flat.storage_offset() * flat.element_size()) % 8:
        flat = flat.clone()  # words must be aligned
    octets = flat.view(torch.uint8)
    if len(octets) % 8:
        octets = torch.nn.functional.pad(octets, (0, -len(octets) % 8))
    words = octets.view(torch.int64)
    whole = len(words) - len(words) % _ROW
    rows = torch.cat([words[:whole].view(-1, _ROW).sum(1), words[whole:].sum()[None]])  # (row column) -> row
    return (rows * (2 * torch.arange(len(rows), device=rows.device) + 1)).sum()
