"""Llama-3's rotary scaling, which GGUF files give as factors and transformers' reader leaves out."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.models._gguf_header import GgufHeader
from metaopt_lens.models._gguf_source import GgufSource

ROPE_FACTORS = "rope_freqs.weight"
# Llama-3's rotary scaling as llama.cpp's converter writes it; only the factor differs between models.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_rotary(header: GgufHeader, name: str, source: GgufSource, config: Any) -> dict[str, Any]:
    """The rotary scaling that a file gives as one factor per frequency, and transformers' reader leaves out.

    Args:
        header: of the file.
        name: the tensor with the factors.
        source: the file.
        config: transformers' configuration.

    Returns:
        transformers' ``rope_parameters``.

    Raises:
        UnsupportedModelError: the factors are not those of Llama-3's scaling.
    """
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(prefix="metaopt-lens-") as folder, source.whole(Path(folder)) as file:
        stored = next(t for t in GGUFReader(file).tensors if t.name == name).data
        found = torch.tensor(stored.tolist(), dtype=torch.float64)
    theta = float(config.rope_parameters["rope_theta"])
    scaling = {"rope_type": "llama3", "rope_theta": theta, "factor": float(found.max()), **_LLAMA3}
    expected = llama3_factors(scaling, 2 * len(found))
    if not torch.allclose(found, expected, rtol=1e-5):
        raise UnsupportedModelError(
            f"{header.path} scales the frequencies of its rotary embedding in a way that is not Llama-3's "
            f"({ROPE_FACTORS}), and transformers does not read it: load the model from the hub or a local folder."
        )
    return scaling


def llama3_factors(scaling: dict[str, Any], dim: int) -> Float[Tensor, " frequency"]:
    """By what Llama-3's scaling divides each frequency, as llama.cpp's converter computes it.

    Args:
        scaling: transformers' ``rope_parameters``.
        dim: rotary dimensions of a head.

    Returns:
        One divisor per frequency, float64.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = torch.pow(scaling["rope_theta"], -torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.reciprocal((1.0 - smooth) / scaling["factor"] + smooth)
