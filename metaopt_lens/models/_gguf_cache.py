"""The cache of converted GGUF files: one folder for each file's hash, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from metaopt_lens._errors import OutputError
from metaopt_lens.models._gguf_conversion import CACHE_VARIABLE, FORMAT, MANIFEST, convert, first_line, hash_of
from metaopt_lens.models._gguf_header import GgufHeader, read_header
from metaopt_lens.models._gguf_readable import check_readable, require_gguf
from metaopt_lens.models._gguf_source import GgufSource
from metaopt_lens.models._memory import check_memory


class CacheRebuiltWarning(UserWarning):
    """A converted model in the cache was damaged or made by another version, and was converted again."""


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
    require_gguf()
    header = read_header(source.parts[0], size=source.n_bytes)
    check_readable(header)
    if check_size:
        check_memory(header.n_values, dtype, device, what=source.name)
    if not cache:
        with tempfile.TemporaryDirectory(prefix="metaopt-lens-", ignore_cleanup_errors=True) as temporary:
            convert(source, header, Path(temporary), source.sha256())
            yield Path(temporary)
        return
    digest = source.sha256()
    folder = cache_folder(cache_dir) / "gguf" / digest
    if not _is_whole(folder):
        _convert_into(source, header, folder, digest)
    yield folder


def cache_folder(given: str | os.PathLike[str] | None) -> Path:
    """Where converted models are kept.

    Args:
        given: a folder; None for the one that ``METAOPT_LENS_CACHE`` names, else one in the user's cache folder.
    """
    named = given or os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaopt-lens"


def _convert_into(source: GgufSource, header: GgufHeader, folder: Path, digest: str) -> None:
    """Convert next to `folder` and rename: another process sees all of it or nothing."""
    if folder.exists():
        reason = "is damaged" if _format_of(folder) in {None, FORMAT} else "was made by another version of metaopt-lens"
        warnings.warn(
            f"the converted model in {folder} {reason}: {source.name} is converted again.",
            CacheRebuiltWarning,
            stacklevel=5,
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(
            f"the cache {folder.parent} cannot be written ({first_line(error)}): name another folder with cache_dir "
            f"or {CACHE_VARIABLE}, or convert without keeping it (cache=False, --no-cache)."
        ) from error
    try:
        convert(source, header, temporary, digest)
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


def _format_of(folder: Path) -> object:
    """The format that a converted folder says it has; None where its manifest cannot be read."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == size and hash_of(folder / name) == digest
            for name, (size, digest) in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
