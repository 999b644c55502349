"""Files: whole or not at all, and damage is noticed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from metaopt_lens._errors import FileFormatError
from metaopt_lens._storage import atomic_path, load_result, provenance, save_result, write_text

TENSORS = {
    "float": torch.randn(3, 4),
    "half": torch.randn(2).bfloat16(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "int": torch.arange(5),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "view": torch.arange(12.0).reshape(3, 4).T[1:],
    "grad": torch.randn(2, requires_grad=True),
}


def test_tensors_and_text_come_back_bit_equal(tmp_path: Path) -> None:
    meta = {"words": ["pear", "Ünïcödé", "\n"], "number": 1.5, "nothing": None}
    assert (
        save_result(tmp_path / "deep" / "x", kind="thing", tensors=TENSORS, meta=meta) == tmp_path / "deep" / "x.json"
    )
    tensors, found = load_result(tmp_path / "deep" / "x", kind="thing")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor.detach())
    assert {key: found[key] for key in meta} == meta
    assert found["provenance"]["torch"] == provenance()["torch"]


@pytest.mark.parametrize("ending", ["", ".json", ".safetensors"])
def test_either_file_names_the_pair(tmp_path: Path, ending: str) -> None:
    save_result(tmp_path / f"x{ending}", kind="thing", tensors={"a": torch.ones(1)}, meta={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.safetensors"]
    load_result(tmp_path / f"x{ending}", kind="thing")


def test_dots_in_names_are_no_endings(tmp_path: Path) -> None:
    for name in ("run.v1", "run.v2"):
        save_result(tmp_path / name, kind="thing", tensors={"a": torch.ones(1)}, meta={"name": name})
    assert load_result(tmp_path / "run.v1", kind="thing")[1]["name"] == "run.v1"
    assert load_result(tmp_path / "run.v2", kind="thing")[1]["name"] == "run.v2"


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_result(path, kind="thing", tensors=TENSORS, meta={})
    file, sidecar = tmp_path / "x.safetensors", tmp_path / "x.json"
    raw, text = file.read_bytes(), sidecar.read_text()
    with pytest.raises(FileFormatError, match=r"x\.json does not describe a saved other \(its kind is 'thing'\)"):
        load_result(path, kind="other")
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(FileFormatError, match=r"x\.safetensors is damaged or belongs to another save"):
        load_result(path, kind="thing")
    file.unlink()
    with pytest.raises(FileFormatError, match=r"x\.safetensors does not exist: a saved thing is a"):
        load_result(path, kind="thing")
    file.write_bytes(raw)
    for broken, message in [
        ("", "not valid JSON"),
        ("[]", "its kind is None"),
        ("{", "not valid JSON"),
        ("{}", "its kind"),
    ]:
        sidecar.write_text(broken)
        with pytest.raises(FileFormatError, match=rf"x\.json .*{message}"):
            load_result(path, kind="thing")
    body = json.loads(text)
    del body["sha256"]
    sidecar.write_text(json.dumps(body))
    with pytest.raises(FileFormatError, match=r"is damaged"):
        load_result(path, kind="thing")
    sidecar.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match=r"x\.json is not valid JSON"):
        load_result(path, kind="thing")


def test_a_save_over_an_old_one_mixes_nothing(tmp_path: Path) -> None:
    """Tensors of one save beside the JSON of another are refused."""
    save_result(tmp_path / "x", kind="thing", tensors={"a": torch.zeros(1)}, meta={"n": 1})
    old = (tmp_path / "x.json").read_text()
    save_result(tmp_path / "x", kind="thing", tensors={"a": torch.ones(1)}, meta={"n": 2})
    assert load_result(tmp_path / "x", kind="thing")[1]["n"] == 2
    (tmp_path / "x.json").write_text(old)
    with pytest.raises(FileFormatError, match=r"belongs to another save"):
        load_result(tmp_path / "x", kind="thing")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "x.txt"
    write_text(target, "old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("new, half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_files_are_ordinary_files(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = write_text(tmp_path / "new" / "x.txt", "é\n")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert path.read_bytes() == "é\n".encode()
        assert os.umask(0o022) == 0o022  # looked at and put back
    finally:
        os.umask(before)


def test_a_tensor_that_cannot_be_stored_leaves_no_pair_that_looks_complete(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_result(tmp_path / "x", kind="thing", tensors={"a": torch.ones(1)}, meta={"bad": object()})
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(FileFormatError, match=r"x\.json does not exist"):
        load_result(tmp_path / "x", kind="thing")
