"""The bundled model's files, read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaopt_lens._errors import FileFormatError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

WEIGHTS_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
_FILES = (WEIGHTS_FILE, METRICS_FILE, "config.json", "tokenizer.json", "tokenizer_config.json")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    for name in _FILES:
        if not (folder / name).is_file():
            raise FileFormatError(
                f"{folder / name} does not exist: the bundled model is incomplete. Reinstall metaopt-lens, "
                "or run the training script again."
            )
    try:
        expected = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["weights_sha256"]
    except (ValueError, KeyError, TypeError):
        raise FileFormatError(f"{folder / METRICS_FILE} is damaged: it names no weights_sha256.") from None
    raw = (folder / WEIGHTS_FILE).read_bytes()
    if hashlib.sha256(raw).hexdigest() != expected:
        raise FileFormatError(
            f"{folder / WEIGHTS_FILE} is damaged: its SHA-256 differs from the one in {METRICS_FILE}. "
            "Reinstall metaopt-lens, or run the training script again."
        )
    return dict(load(raw))


def copy_weights(into: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy tensors of equal names and shapes.

    Args:
        into: the tensors to fill.
        weights: what to fill them with.
        origin: names the weights in errors.

    Raises:
        FileFormatError: anything missing, left over or of another shape.
    """
    if into.keys() != weights.keys():
        raise FileFormatError(
            f"{origin}: the tensors are not those of the model; "
            f"missing {sorted(into.keys() - weights.keys())}, "
            f"unexpected {sorted(weights.keys() - into.keys())}."
        )
    with torch.no_grad():
        for name, target in into.items():
            if target.shape != weights[name].shape:
                raise FileFormatError(
                    f"{origin}: {name} has shape {tuple(weights[name].shape)}, the model needs {tuple(target.shape)}."
                )
            target.copy_(weights[name])


def read_model(folder: Path) -> LlamaForCausalLM:
    """The transformers model of a folder, its files checked.

    Args:
        folder: where the training script wrote.

    Raises:
        FileFormatError: a file is missing or damaged.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = _read_weights(folder)
    try:
        config = LlamaConfig.from_json_file(folder / "config.json")
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{folder / 'config.json'} is damaged ({error}).") from None
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    copy_weights(model.state_dict(), weights, str(folder / WEIGHTS_FILE))
    return model


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Args:
        folder: where the training script wrote.

    Raises:
        FileFormatError: its files are damaged.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
        raise FileFormatError(f"the tokenizer files in {folder} are damaged ({error}).") from error
