"""The header of a GGUF file, read in milliseconds: what is in it, and whether it is all there."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaopt_lens._errors import FileFormatError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MIN_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# GGUFValueType -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header announces it; `shape` in the order of torch."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def n_values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table; arrays in the metadata are given by their length.

    Attributes:
        path: the file, as it is named in messages.
        data_start: where the tensors' bytes begin.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata["general.architecture"])

    @property
    def n_values(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.n_values for tensor in self.tensors)

    def setting(self, name: str) -> Any:
        """The value of ``<architecture>.<name>``, None where the file has none."""
        return self.metadata.get(f"{self.architecture}.{name}")


def read_header(path: Path, *, size: int | None = None) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Args:
        path: the file, or the first part of one that was cut into parts.
        size: bytes of all parts together; those of `path` if not given.

    Raises:
        FileFormatError: not a GGUF file, one of an unknown version, one without an architecture, or cut short.
        UnsupportedModelError: one of several files of a split model.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != _MAGIC:
            shown = magic.decode("ascii", "backslashreplace")
            raise FileFormatError(
                f"{path} is not a GGUF file: it begins with {shown!r} instead of 'GGUF'. Give a .gguf file, a folder "
                "with config.json, weights and tokenizer, or a model's name."
            )
        if n_bytes < 24:  # magic, version and two counts
            raise _cut_short(path, n_bytes, "its header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
            try:
                header = _parse(blob, path)
            except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
                raise _cut_short(path, n_bytes, "its header") from error
    _check_complete(header, n_bytes if size is None else size)
    if int(header.metadata.get("split.count", 1)) > 1:
        raise UnsupportedModelError(
            f"{path} is one of {header.metadata['split.count']} files of a split model, and transformers reads whole "
            "files only: join them first (llama-gguf-split --merge FIRST OUT)."
        )
    return header


def _parse(blob: mmap.mmap, path: Path) -> GgufHeader:
    version, n_tensors, n_settings = struct.unpack_from("<IQQ", blob, 4)
    if version not in _VERSIONS:
        raise FileFormatError(f"{path} is GGUF of version {version}: only versions 2 and 3 can be read.")
    at, metadata = 24, {}
    for _ in range(n_settings):
        key, at = _string(blob, at)
        (kind,) = struct.unpack_from("<I", blob, at)
        metadata[key], at = _value(blob, at + 4, kind)
    tensors = []
    for _ in range(n_tensors):
        name, at = _string(blob, at)
        (n_axes,) = struct.unpack_from("<I", blob, at)
        axes = struct.unpack_from(f"<{n_axes}Q", blob, at + 4)
        type_id, offset = struct.unpack_from("<IQ", blob, at + 4 + 8 * n_axes)
        at += 16 + 8 * n_axes
        tensors.append(GgufTensor(name, tuple(reversed(axes)), type_id, offset))
    if "general.architecture" not in metadata:
        raise FileFormatError(f"{path} names no general.architecture: it holds no language model.")
    alignment = int(metadata.get("general.alignment", _MIN_ALIGNMENT))
    return GgufHeader(path, metadata, tuple(tensors), -(-at // alignment) * alignment)


def _string(blob: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", blob, at)
    text = blob[at + 8 : at + 8 + length]
    if len(text) < length:
        raise IndexError("string beyond the end of the file")
    return text.decode("utf-8"), at + 8 + length


def _value(blob: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A setting's value (of an array: its length), and where the next one begins."""
    if kind in _SCALARS:
        form = "<" + _SCALARS[kind]
        return struct.unpack_from(form, blob, at)[0], at + struct.calcsize(form)
    if kind == _STRING:
        return _string(blob, at)
    if kind != _ARRAY:
        raise IndexError(f"value of unknown type {kind}")
    item, length = struct.unpack_from("<IQ", blob, at)
    at += 12
    if item in _SCALARS:
        return length, at + length * struct.calcsize("<" + _SCALARS[item])
    for _ in range(length):
        _, at = _value(blob, at, item)
    return length, at


def _check_complete(header: GgufHeader, n_bytes: int) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    for tensor in header.tensors:
        if tensor.type_id not in known:
            names = ", ".join(kind.name for kind in GGMLQuantizationType)
            raise FileFormatError(
                f"{header.path}: {tensor.name} has the number format {tensor.type_id}, which the installed gguf "
                f"package does not know (it knows {names}). Update it: pip install --upgrade gguf"
            )
        per_block, block_bytes = known[tensor.type_id]
        end = header.data_start + tensor.offset + tensor.n_values // per_block * block_bytes
        if end > n_bytes:
            raise _cut_short(header.path, n_bytes, f"{tensor.name}, which ends at byte {end:,}")


def _cut_short(path: Path, n_bytes: int, where: str) -> FileFormatError:
    return FileFormatError(
        f"{path} is cut short or damaged: it has {n_bytes:,} bytes and ends before {where}. Copy or download it again."
    )
