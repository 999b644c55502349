"""A GGUF file on disk, and what a model made of one says about it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The key in config.json that says where the weights come from.
SOURCE_KEY = "metaopt_lens_source"


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
    def whole(self, folder: Path) -> Iterator[Path]:
        """The file in one piece: itself, or its parts joined in a folder for the time of the block.

        Args:
            folder: where to join them.
        """
        if len(self.parts) == 1:
            yield self.parts[0].absolute()
            return
        joined = folder / f"{self.name}.gguf"
        try:
            with joined.open("wb") as target:
                for part in self.parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, target, 1 << 20)
            yield joined
        finally:
            joined.unlink(missing_ok=True)


def quantization_of(config: Any) -> str:
    """What the weights of a loaded model were de-quantised from, such as ``"Q4_1 GGUF"``; ``"none"`` if not at all.

    Args:
        config: the transformers configuration, or None.
    """
    found = getattr(config, SOURCE_KEY, None)
    return str(found["quantization"]) if isinstance(found, dict) else "none"


def weights_file(config: Any) -> dict[str, str] | None:
    """Name, SHA-256 and quantisation of the GGUF file that a loaded model is from; None if it is from none.

    Args:
        config: the transformers configuration, or None.
    """
    found = getattr(config, SOURCE_KEY, None)
    return {key: str(found[key]) for key in ("name", "sha256", "quantization")} if isinstance(found, dict) else None


def adds_bos(config: Any) -> bool | None:
    """Whether a GGUF file says that BOS stands first; None if it does not say, or the model is from no GGUF file.

    Args:
        config: the transformers configuration, or None.
    """
    found = getattr(config, SOURCE_KEY, None)
    return found.get("add_bos") if isinstance(found, dict) else None
