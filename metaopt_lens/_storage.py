"""Atomic files, and results stored as a safetensors and a JSON file.

A result saved as ``x`` is two files: ``x.safetensors`` (the tensors) and ``x.json`` (everything else, with the
SHA-256 of the tensor file). The JSON is written last, so a killed save leaves no pair that looks complete.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from metaopt_lens._errors import FileFormatError

_PACKAGES = ("metaopt-lens", "transformer-lens", "transformers", "torch")


def provenance() -> dict[str, Any]:
    """Versions and time of day, to be stored with every result."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **_versions(),
    }


@cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`, and rename it to `path` only if the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; results are ordinary ones
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically and return its path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def _pair(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    base = Path(path)
    if base.suffix in {".safetensors", ".json"}:
        base = base.with_suffix("")
    return base.with_name(base.name + ".safetensors"), base.with_name(base.name + ".json")


def save_result(
    path: str | os.PathLike[str], *, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> Path:
    """Store tensors and JSON-able metadata as ``path.safetensors`` and ``path.json``; returns the JSON's path."""
    from safetensors.torch import save_file

    tensor_file, json_file = _pair(path)
    with atomic_path(tensor_file) as temporary:
        save_file(_apart(tensors), temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    body = {"kind": kind, "sha256": digest, "provenance": provenance(), **meta}
    return write_text(json_file, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in the same memory (safetensors refuses that)."""
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        found[name] = own.clone() if own.untyped_storage().data_ptr() in memory else own
        memory.add(found[name].untyped_storage().data_ptr())
    return found


def load_result(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_result` wrote; `FileFormatError` names a file that is missing, damaged or of another kind."""
    from safetensors.torch import load

    tensor_file, json_file = _pair(path)
    for file in (tensor_file, json_file):
        if not file.is_file():
            raise FileFormatError(f"{file} does not exist: a saved {kind} is a .safetensors and a .json file.")
    try:
        meta = json.loads(json_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{json_file} is not valid JSON ({error}).") from None
    found = meta.get("kind") if isinstance(meta, dict) else None
    if found != kind:
        raise FileFormatError(f"{json_file} does not describe a saved {kind} (its kind is {found!r}).")
    raw = tensor_file.read_bytes()
    if hashlib.sha256(raw).hexdigest() != meta.get("sha256"):
        raise FileFormatError(
            f"{tensor_file} is damaged or belongs to another save: its SHA-256 differs from the one in {json_file}."
        )
    return load(raw), meta
