"""What transformers can read of GGUF, and how a file is quantised."""

from __future__ import annotations

import importlib.metadata

from metaopt_lens._errors import FileFormatError, OptionError, UnsupportedModelError
from metaopt_lens.models._gguf_header import GgufHeader


def require_gguf() -> None:
    """Raise `OptionError` unless the package gguf is installed."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise OptionError("reading a GGUF file needs the package gguf: pip install 'metaopt-lens[gguf]'")


def readable_architectures() -> list[str]:
    """The architectures that the installed transformers can read from GGUF."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})


def check_readable(header: GgufHeader) -> None:
    """Require that transformers reads such a file.

    Args:
        header: of the file.

    Raises:
        UnsupportedModelError: an architecture or rotary scaling that it does not read.
        FileFormatError: there is no tokenizer in it.
    """

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


def quantization(header: GgufHeader) -> str:
    """``general.file_type`` by name; where it is missing, the format that most of the numbers have.

    Args:
        header: of the file.
    """
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
