"""GGUF files: de-quantised by transformers' own reader, and kept as an ordinary model folder in a cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import FileFormatError, OptionError, OutputError, UnsupportedModelError
from metaopt_lens.models._gguf_header import GgufHeader, read_header
from metaopt_lens.models._memory import check_memory

CACHE_VARIABLE = "METAOPT_LENS_CACHE"
# The key in config.json that says where the weights come from.
SOURCE_KEY = "metaopt_lens_source"
_MANIFEST = "metaopt-lens.json"
_FORMAT = 2  # of the converted folder: raised when a conversion changes
_ROPE_FACTORS = "rope_freqs.weight"
# Llama-3's rotary scaling as llama.cpp's converter writes it; only the factor differs between models.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SAVED_DTYPE = torch.float32  # products of 16-bit scales and small integers: exact in no 16-bit type


class CacheRebuiltWarning(UserWarning):
    """A converted model in the cache was damaged, and was converted again."""


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file, or the parts it was cut into.

    Attributes:
        name: what the model is called in results.
        parts: the file's pieces in order; usually one.
    """

    name: str
    parts: tuple[Path, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the whole file."""
        return sum(part.stat().st_size for part in self.parts)

    def sha256(self) -> str:
        """Hash of the whole file."""
        digest = hashlib.sha256()
        for part in self.parts:
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@contextmanager
def converted(
    source: GgufSource,
    *,
    dtype: torch.dtype,
    device: str | None,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    check_size: bool = True,
) -> Iterator[Path]:
    """The folder that a GGUF file was converted into, which `transformers` and TransformerLens load as any other.

    Args:
        source: the file.
        dtype: type in which the model will be loaded; the folder holds float32, in which de-quantising is exact.
        device: where it will be loaded.
        cache: keep the folder, and use the one that is there; otherwise it is deleted after the block.
        cache_dir: where to keep it; by default the folder that ``METAOPT_LENS_CACHE`` names, else
            ``metaopt-lens`` in the user's cache folder.
        check_size: refuse a model that does not fit memory (not where it is spread over devices).

    Raises:
        OptionError: the package `gguf` is not installed.
        FileFormatError: no GGUF file, a damaged one, or one without tokenizer.
        UnsupportedModelError: transformers cannot read the architecture, or not all of the file.
        ModelTooLargeError: the weights do not fit memory.
        OutputError: the cache cannot be written, or has no space.
    """
    _require_gguf()
    header = read_header(source.parts[0], size=source.n_bytes)
    _check_readable(header)
    if check_size:
        check_memory(header.n_values, dtype, device, what=source.name)
    if not cache:
        with tempfile.TemporaryDirectory(prefix="metaopt-lens-", ignore_cleanup_errors=True) as temporary:
            _convert(source, header, Path(temporary), source.sha256())
            yield Path(temporary)
        return
    digest = source.sha256()
    folder = _cache_folder(cache_dir) / "gguf" / digest
    if not _is_whole(folder):
        _convert_into(source, header, folder, digest)
    yield folder


def quantization_of(config: Any) -> str:
    """What the weights of a loaded model were de-quantised from, such as ``"Q4_1 GGUF"``; ``"none"`` if not at all.

    Args:
        config: the transformers configuration, or None.
    """
    found = getattr(config, SOURCE_KEY, None)
    return str(found["quantization"]) if isinstance(found, dict) else "none"


def adds_bos(config: Any) -> bool | None:
    """Whether a GGUF file says that BOS stands first; None if it does not say, or the model is from no GGUF file.

    Args:
        config: the transformers configuration, or None.
    """
    found = getattr(config, SOURCE_KEY, None)
    return found.get("add_bos") if isinstance(found, dict) else None


# ---- what can be read ---------------------------------------------------------------------------------------------


def _require_gguf() -> None:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise OptionError("reading a GGUF file needs the package gguf: pip install 'metaopt-lens[gguf]'")


def readable_architectures() -> list[str]:
    """The architectures that the installed transformers can read from GGUF."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})


def _check_readable(header: GgufHeader) -> None:
    def plain(name: str) -> str:
        return name.replace("-", "").replace("_", "")  # transformers spells qwen2moe and gpt-oss with underscores

    known = readable_architectures()
    if plain(header.architecture) not in {plain(name) for name in known}:
        raise UnsupportedModelError(
            f"{header.path} holds a model of the architecture {header.architecture!r}, which transformers "
            f"{importlib.metadata.version('transformers')} cannot read from GGUF. It can read {', '.join(known)}."
        )
    if not header.metadata.get("tokenizer.ggml.tokens"):
        raise FileFormatError(
            f"{header.path} holds no tokenizer (tokenizer.ggml.tokens): prompts cannot be turned into tokens. Use a "
            "GGUF file with its vocabulary."
        )
    scaling = header.setting("rope.scaling.type")
    if scaling not in (None, "none") and plain(header.architecture) != "gptoss":
        raise UnsupportedModelError(
            f"{header.path} scales its rotary embedding ({scaling!r}), which transformers does not read from a GGUF "
            f"file of the architecture {header.architecture!r}: the model would not be the one in the file. Load the "
            "model from the hub or a local folder."
        )


def _quantization(header: GgufHeader) -> str:
    """``general.file_type`` by name; where it is missing, the format that most of the numbers have."""
    from gguf import GGMLQuantizationType, LlamaFileType

    kind = header.metadata.get("general.file_type")
    known = {int(member): member.name for member in LlamaFileType}
    if kind in known:
        name = known[kind].removeprefix("MOSTLY_").removeprefix("ALL_")
    else:
        counts: dict[int, int] = {}
        for tensor in header.tensors:
            counts[tensor.type_id] = counts.get(tensor.type_id, 0) + tensor.n_values
        name = GGMLQuantizationType(max(counts, key=counts.__getitem__)).name
    return f"{name} GGUF"


# ---- conversion ---------------------------------------------------------------------------------------------------


def _convert(source: GgufSource, header: GgufHeader, folder: Path, digest: str) -> None:
    """De-quantise into `folder`: config, weights, tokenizer, and a manifest with the hash of each file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_space(folder, header.n_values * _SAVED_DTYPE.itemsize + (source.n_bytes if len(source.parts) > 1 else 0))
    quantization = _quantization(header)
    with _whole_file(source, folder) as file:
        read: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **read)
            model, report = AutoModelForCausalLM.from_pretrained(
                str(file.parent), dtype=_SAVED_DTYPE, output_loading_info=True, **read
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OSError) as error:
            raise UnsupportedModelError(
                f"transformers cannot read {header.path} ({header.architecture}, {quantization}): {_first_line(error)}."
            ) from error
    _check_read(header, model, report)
    if (factors := next((t for t in header.tensors if t.name == _ROPE_FACTORS), None)) is not None:
        model.config.rope_parameters = _llama3_rotary(header, factors.name, source, model.config)
    # transformers refuses to save what a quantizer loaded, though these are ordinary weights.
    model.hf_quantizer = None
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    setattr(
        model.config,
        SOURCE_KEY,
        {
            "name": source.name,
            "quantization": quantization,
            "sha256": digest,
            "add_bos": header.metadata.get("tokenizer.ggml.add_bos_token"),
            "transformers": importlib.metadata.version("transformers"),
            "gguf": importlib.metadata.version("gguf"),
        },
    )
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = {file.name: [file.stat().st_size, _hash(file)] for file in sorted(folder.iterdir())}
        manifest = {"format": _FORMAT, "sha256": digest, "files": files}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except Exception as error:  # safetensors raises its own class for a full disk
        raise OutputError(
            f"the converted model cannot be written to {folder.parent} ({_first_line(error)}): make room there, or "
            f"name another folder with cache_dir or {CACHE_VARIABLE}."
        ) from error


def _check_read(header: GgufHeader, model: torch.nn.Module, report: dict[str, Any]) -> None:
    """Nothing of the model may be made up, and nothing of the file left out."""
    lacking = sorted({str(key) for key in report["missing_keys"]})
    n_model = sum(parameter.numel() for parameter in model.parameters())
    n_file = sum(tensor.n_values for tensor in header.tensors if tensor.name != _ROPE_FACTORS)
    if lacking or report["mismatched_keys"] or n_model != n_file:
        shown = f", among them not {', '.join(lacking[:3])}" if lacking else ""
        raise UnsupportedModelError(
            f"transformers does not read {header.path} whole: the file holds {n_file:,} numbers and the "
            f"{header.architecture} model made of it has {n_model:,}{shown}."
        )


def _llama3_rotary(header: GgufHeader, name: str, source: GgufSource, config: Any) -> dict[str, Any]:
    """The rotary scaling that the file gives as one factor per frequency, and transformers' reader leaves out."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(prefix="metaopt-lens-") as folder, _whole_file(source, Path(folder)) as file:
        stored = next(t for t in GGUFReader(file).tensors if t.name == name).data
        found = torch.tensor(stored.tolist(), dtype=torch.float64)
    theta = float(config.rope_parameters["rope_theta"])
    scaling = {"rope_type": "llama3", "rope_theta": theta, "factor": float(found.max()), **_LLAMA3}
    expected = llama3_factors(scaling, 2 * len(found))
    if not torch.allclose(found, expected, rtol=1e-5):
        raise UnsupportedModelError(
            f"{header.path} scales the frequencies of its rotary embedding in a way that is not Llama-3's "
            f"({_ROPE_FACTORS}), and transformers does not read it: load the model from the hub or a local folder."
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


@contextmanager
def _whole_file(source: GgufSource, folder: Path) -> Iterator[Path]:
    """The file in one piece: itself, or its parts joined in `folder` for the time of the block."""
    if len(source.parts) == 1:
        yield source.parts[0].absolute()
        return
    joined = folder / f"{source.name}.gguf"
    try:
        with joined.open("wb") as target:
            for part in source.parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, target, 1 << 20)
        yield joined
    finally:
        joined.unlink(missing_ok=True)


# ---- cache --------------------------------------------------------------------------------------------------------


def _cache_folder(given: str | os.PathLike[str] | None) -> Path:
    named = given or os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaopt-lens"


def _convert_into(source: GgufSource, header: GgufHeader, folder: Path, digest: str) -> None:
    """Convert next to `folder` and rename: another process sees all of it or nothing."""
    if folder.exists():
        warnings.warn(
            f"the converted model in {folder} is damaged: {source.name} is converted again.",
            CacheRebuiltWarning,
            stacklevel=5,
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(
            f"the cache {folder.parent} cannot be written ({_first_line(error)}): name another folder with cache_dir "
            f"or {CACHE_VARIABLE}, or convert without keeping it (cache=False, --no-cache)."
        ) from error
    try:
        _convert(source, header, temporary, digest)
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder)
        if not folder.exists():
            _open_to_others(temporary)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """The permissions of ordinary files: temporary folders and safetensors files are private."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


def _is_whole(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return manifest["format"] == _FORMAT and all(
            (folder / name).stat().st_size == size and _hash(folder / name) == digest
            for name, (size, digest) in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_space(folder: Path, needed: int) -> None:
    """Raise `OutputError` unless `needed` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"no space for the converted model: it takes {needed / 2**30:.1f} GiB, and {folder.parent} has "
            f"{free / 2**30:.1f} GiB free. Make room, or name another folder with cache_dir or {CACHE_VARIABLE}."
        )


def _hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .") if text else type(error).__name__
