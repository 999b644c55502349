"""Load a model by name: the bundled one, one from a package, a GGUF file, a local folder, or one on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from metaopt_lens._errors import FileFormatError, OptionError, UnsupportedModelError
from metaopt_lens.models._gguf_cache import converted
from metaopt_lens.models._gguf_source import GgufSource, adds_bos
from metaopt_lens.models._memory import check_memory, count_values
from metaopt_lens.models._packaged import PACKAGED, packaged_source

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TINY = "tiny"
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
    n_devices: int | None = None,
    device_map: str | None = None,
    cache: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> TransformerBridge:
    """A TransformerBridge with unprocessed weights.

    A GGUF file is de-quantised by transformers once and kept as a model folder in a cache, under the file's hash.

    Args:
        name_or_path: ``"tiny"`` for the bundled model; ``"smollm2"`` or ``"gemma3-270m"`` for pretrained models from
            packages; a GGUF file, as Ollama, llama.cpp and LM Studio keep them; a local folder with config, weights
            and tokenizer; or a name on the Hugging Face hub.
        dtype: floating-point type of the weights.
        device: where to put the model; by default the bundled model goes to the CPU, any other where TransformerLens
            puts it.
        revision: branch, tag or commit of a model on the hub.
        n_devices: spread the model over this many devices; passed to TransformerLens.
        device_map: which module goes to which device, such as ``"auto"``; likewise.
        cache: keep and use the converted form of a GGUF file; without it the file is converted each time.
        cache_dir: folder of the cache; by default the one that the environment variable ``METAOPT_LENS_CACHE``
            names, else ``metaopt-lens`` in the user's cache folder.

    Raises:
        OptionError: `device` cannot be used here, the bundled model is asked to spread, or a package is not installed.
        FileFormatError: a file or folder that does not exist, is damaged, or lacks something.
        UnsupportedModelError: a name that nobody knows, a hub that cannot be reached, an architecture that
            TransformerLens cannot load, or transformers cannot read from GGUF.
        ModelTooLargeError: the weights take more memory than is available.
        OutputError: the cache cannot be written, or has no space.
    """
    _check_device(device)
    name = os.fspath(name_or_path)
    spread = {
        option: value for option, value in (("n_devices", n_devices), ("device_map", device_map)) if value is not None
    }
    on_hub = {} if revision is None else {"revision": revision}
    path = Path(name).expanduser()
    if name == TINY:
        if spread or on_hub:
            raise OptionError(f"the bundled model has no {' or '.join([*on_hub, *spread])}: leave it out.")
        from metaopt_lens.models.tiny import load_tiny

        return load_tiny(dtype=dtype, device=device)
    if name in PACKAGED or path.is_file():
        if on_hub:
            raise OptionError(f"{name} is not on the hub and has no revision: leave it out.")
        source = packaged_source(name) if name in PACKAGED else GgufSource(path.name.removesuffix(".gguf"), (path,))
        with converted(
            source, dtype=dtype, device=device, cache=cache, cache_dir=cache_dir, check_size=not spread
        ) as folder:
            bridge = _boot(str(folder), True, dtype=dtype, device=device, **spread)
        bridge.cfg.model_name = source.name  # the folder is a path on this machine: it belongs in no result
        if (says := adds_bos(bridge.original_model.config)) is not None:
            bridge.cfg.default_prepend_bos = says  # TransformerLens goes by the architecture, the file knows better
        return bridge
    is_folder = path.is_dir()
    if is_folder:
        _check_folder(path)
        if not spread:
            check_memory(count_values(path), dtype, device, what=f"the model in {path}")
    elif _looks_like_a_path(name):
        raise FileFormatError(
            f"there is no file or folder {name}: give a GGUF file, a folder with config.json, weights and tokenizer, "
            f"a model's name on the hub, one of {', '.join(map(repr, PACKAGED))} from packages, or {TINY!r} for the "
            "bundled model."
        )
    return _boot(str(path) if is_folder else name, is_folder, dtype=dtype, device=device, **on_hub, **spread)


def _boot(name: str, is_folder: bool, **options: Any) -> TransformerBridge:
    from safetensors import SafetensorError
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridge = TransformerBridge.boot_transformers(name, **options)
    except (OSError, SafetensorError, UnpicklingError, EOFError) as error:
        if is_folder:
            raise FileFormatError(f"the model in {name} cannot be read ({_first_line(error)}).") from error
        raise UnsupportedModelError(
            f"the model {name!r} was not found: either the hub has no such model, or it asks for a login, or it cannot "
            f"be reached from here ({_first_line(error)}). Check the name, or give a local folder with config.json, "
            "weights and tokenizer; 'tiny', and 'smollm2' and 'gemma3-270m' from packages, need no hub."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, AttributeError, NotImplementedError, ImportError, RuntimeError) as error:
        raise UnsupportedModelError(f"TransformerLens cannot load {name} ({_first_line(error)}).") from error
    return bridge.eval()


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without that device
        raise OptionError(f"the device {device!r} cannot be used here ({_first_line(error)}): try 'cpu'.") from None


def _check_folder(folder: Path) -> None:
    for what, patterns in (
        ("config.json", ("config.json",)),
        ("weights (.safetensors or .bin)", _WEIGHTS),
        ("tokenizer", _TOKENIZER),
    ):
        if not any(found for pattern in patterns for found in folder.glob(pattern)):
            raise FileFormatError(
                f"the folder {folder} holds no {what}: a local model is a folder with config.json, weights and "
                "tokenizer, as save_pretrained of the model and of its tokenizer write them."
            )


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or name.endswith("/")
        or "\\" in name
        or name.endswith(".gguf")
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .") if text else type(error).__name__
