"""GGUF files: de-quantised by transformers' own reader into an ordinary model folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from metaopt_lens._errors import OutputError, UnsupportedModelError
from metaopt_lens.models._gguf_header import GgufHeader
from metaopt_lens.models._gguf_readable import quantization
from metaopt_lens.models._gguf_rotary import ROPE_FACTORS, llama3_rotary
from metaopt_lens.models._gguf_source import SOURCE_KEY, GgufSource

CACHE_VARIABLE = "METAOPT_LENS_CACHE"
MANIFEST = "metaopt-lens.json"
FORMAT = 2  # of the converted folder: raised when a conversion changes
_SAVED_DTYPE = torch.float32  # products of 16-bit scales and small integers: exact in no 16-bit type


def convert(source: GgufSource, header: GgufHeader, folder: Path, digest: str) -> None:
    """De-quantise a file: config, weights, tokenizer, and a manifest with the hash of each file.

    Args:
        source: the file.
        header: its header.
        folder: where to write.
        digest: hash of the file.

    Raises:
        UnsupportedModelError: transformers cannot read all of it.
        OutputError: the folder cannot be written, or has no space.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_space(folder, header.n_values * _SAVED_DTYPE.itemsize + (source.n_bytes if len(source.parts) > 1 else 0))
    format_name = quantization(header)
    with source.whole(folder) as file:
        read: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **read)
            model, report = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=_SAVED_DTYPE, output_loading_info=True, **read
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OSError) as error:
            raise UnsupportedModelError(
                f"transformers cannot read {header.path} ({header.architecture}, {format_name}): {first_line(error)}."
            ) from error
    _check_read(header, model, report)
    if (factors := next((t for t in header.tensors if t.name == ROPE_FACTORS), None)) is not None:
        model.config.rope_parameters = llama3_rotary(header, factors.name, source, model.config)
    # transformers refuses to save what a quantizer loaded, though these are ordinary weights.
    model.hf_quantizer = None
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    setattr(
        model.config,
        SOURCE_KEY,
        {
            "name": source.name,
            "quantization": format_name,
            "sha256": digest,
            "add_bos": header.metadata.get("tokenizer.ggml.add_bos_token"),
            "transformers": importlib.metadata.version("transformers"),
            "gguf": importlib.metadata.version("gguf"),
        },
    )
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = {file.name: [file.stat().st_size, hash_of(file)] for file in sorted(folder.iterdir())}
        manifest = {"format": FORMAT, "sha256": digest, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except Exception as error:  # safetensors raises its own class for a full disk
        raise OutputError(
            f"the converted model cannot be written to {folder.parent} ({first_line(error)}): make room there, or "
            f"name another folder with cache_dir or {CACHE_VARIABLE}."
        ) from error


def _check_read(header: GgufHeader, model: torch.nn.Module, report: dict[str, Any]) -> None:
    """Nothing of the model may be made up, and nothing of the file left out."""
    lacking = sorted({str(key) for key in report["missing_keys"]})
    n_model = sum(parameter.numel() for parameter in model.parameters())
    n_file = sum(tensor.n_values for tensor in header.tensors if tensor.name != ROPE_FACTORS)
    if lacking or report["mismatched_keys"] or n_model != n_file:
        shown = f", among them not {', '.join(lacking[:3])}" if lacking else ""
        raise UnsupportedModelError(
            f"transformers does not read {header.path} whole: the file holds {n_file:,} numbers and the "
            f"{header.architecture} model made of it has {n_model:,}{shown}."
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise `OutputError` unless enough is free.

    Args:
        folder: where to write.
        needed: bytes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"no space for the converted model: it takes {needed / 2**30:.1f} GiB, and {folder.parent} has "
            f"{free / 2**30:.1f} GiB free. Make room, or name another folder with cache_dir or {CACHE_VARIABLE}."
        )


def hash_of(file: Path) -> str:
    """SHA-256 of a file.

    Args:
        file: which.
    """
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop.

    Args:
        error: which.
    """
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .") if text else type(error).__name__
