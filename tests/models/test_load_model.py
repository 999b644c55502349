"""Models by name: what is refused, and that a local folder is loaded as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import make_hf, tokenizer
from rounding import PASS, STEP, assert_agree

from metaopt_lens._errors import FileFormatError, OptionError, UnsupportedModelError
from metaopt_lens.models import load_model, wrap


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-llama"
    make_hf("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_local_folder_is_loaded_unprocessed(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(str(folder), dtype=dtype, device="cpu")
    assert not wrap(model).info.is_processed
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids = torch.tensor([[1, 7, 8, 9]])
    with torch.inference_mode():
        expected = make_hf("llama").to(dtype)(ids).logits
        assert_agree(model(ids), expected, PASS if dtype == torch.float32 else STEP, dtype=dtype)


def test_tiny_is_the_bundled_model() -> None:
    info = wrap(load_model("tiny")).info
    assert info.name == "metaopt-lens-tiny"
    assert (info.n_layers, info.n_heads) == (3, 4)


def test_a_name_nobody_knows_is_refused_with_advice() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'no-such-model-xyz' was not found.* local folder"):
        load_model("no-such-model-xyz")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileFormatError, match=r"there is no file or folder .*absent: give a GGUF file, a folder with config.json"
    ):
        load_model(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer")],
)
def test_an_incomplete_folder_is_refused(folder: Path, tmp_path: Path, missing: str, message: str) -> None:
    for file in folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileFormatError, match=f"holds {message}.*save_pretrained"):
        load_model(str(tmp_path))


def test_an_unknown_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(
        config.replace('"model_type": "llama"', '"model_type": "no-such"'), encoding="utf-8"
    )
    with pytest.raises(UnsupportedModelError, match="TransformerLens cannot load"):
        load_model(str(tmp_path))


def test_a_damaged_config_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(FileFormatError, match="cannot be read"):
        load_model(str(tmp_path))


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises((FileFormatError, UnsupportedModelError), match=r"cannot (be read|load)"):
        load_model(str(tmp_path))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match="the device 'abacus' cannot be used here"):
        load_model("tiny", device="abacus")
