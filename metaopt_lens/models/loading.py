"""Load a model by name: the bundled one, a local folder, or one on the hub."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from metaopt_lens._errors import FileFormatError, OptionError, UnsupportedModelError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TINY = "tiny"
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")


def load_model(
    name_or_dir: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
    n_devices: int | None = None,
    device_map: str | None = None,
) -> TransformerBridge:
    """A TransformerBridge with unprocessed weights.

    Args:
        name_or_dir: ``"tiny"`` for the bundled model, a local folder with config, weights and tokenizer, or a name
            on the Hugging Face hub.
        dtype: floating-point type of the weights.
        device: where to put the model; by default the bundled model goes to the CPU, any other where TransformerLens
            puts it.
        revision: branch, tag or commit of a model on the hub.
        n_devices: spread the model over this many devices; passed to TransformerLens.
        device_map: which module goes to which device, such as ``"auto"``; likewise.

    Raises:
        OptionError: `device` cannot be used here, or the bundled model is asked to spread.
        FileFormatError: a folder that does not exist, or lacks a file.
        UnsupportedModelError: a name that nobody knows, a hub that cannot be reached, an architecture that
            TransformerLens cannot load.
    """
    _check_device(device)
    spread = {
        name: value
        for name, value in (("revision", revision), ("n_devices", n_devices), ("device_map", device_map))
        if value is not None
    }
    if name_or_dir == TINY:
        if spread:
            raise OptionError(f"the bundled model has no {' or '.join(spread)}: leave it out.")
        from metaopt_lens.models.tiny import load_tiny

        return load_tiny(dtype=dtype, device=device)
    folder = Path(name_or_dir).expanduser()
    is_folder = folder.is_dir()
    if is_folder:
        _check_folder(folder)
    elif _looks_like_a_path(name_or_dir):
        raise FileFormatError(
            f"there is no folder {name_or_dir}: give a folder with config.json, weights and tokenizer, a model's "
            f"name on the hub, or {TINY!r} for the bundled model."
        )
    return _boot(str(folder) if is_folder else name_or_dir, is_folder, dtype=dtype, device=device, **spread)


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
            "weights and tokenizer."
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
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .") if text else type(error).__name__
