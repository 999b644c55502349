"""A decomposition on disk."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt_lens._errors import FileFormatError
from metaopt_lens._storage import load_result, save_result
from metaopt_lens.prompts import Demo, ICLPrompt, Template
from metaopt_lens.runs import runs_from_file, runs_to_file

if TYPE_CHECKING:
    from metaopt_lens.decomposition._decomposition import Decomposition

KIND = "decomposition"


def save_decomposition(path: str | os.PathLike[str], result: Decomposition) -> Path:
    """Write ``path.safetensors`` and ``path.json``; returns the latter."""
    tensors, runs = runs_to_file(result.runs)
    if result.source is not None or result.stored_strength is not None:
        tensors["strength"] = result.strength
    meta = {
        "runs": runs,
        "prompt": dataclasses.asdict(result.prompt),
        "keep_position_axis": result.keep_position_axis,
        "provenance": result.provenance,
    }
    return save_result(path, kind=KIND, tensors=tensors, meta=meta)


def decomposition_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a decomposition that `save_decomposition` wrote.

    Raises:
        FileFormatError: a file is missing, damaged, of version 0.1, or holds something else.
    """
    tensors, meta = load_result(path, kind=KIND)
    if "tokenized" in meta.get("prompt", {}):
        raise FileFormatError(
            f"{path} was written by metaopt-lens 0.1, which kept the zero-shot runs' outputs but not the runs: "
            "decompose the prompt again."
        )
    try:
        text = dict(meta["prompt"])
        text["demos"] = [Demo(**demo) for demo in text["demos"]]
        text["template"] = Template(**text["template"])
        return {
            "prompt": ICLPrompt(**text),
            "runs": runs_from_file(tensors, meta["runs"]),
            "keep_position_axis": meta["keep_position_axis"],
            "provenance": meta["provenance"],
            "stored_strength": tensors.get("strength"),
        }
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{path} is not a complete {KIND}: {error!r}.") from None
