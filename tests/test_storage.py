"""Files: whole or not at all, and damage is noticed."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from metaopt_lens._codec import NOT_IN_0_1, NOT_STORED, Stored, stored_as
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


# ---- the codec --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """A nested value with a tensor of its own."""

    name: str
    weight: Float[Tensor, "row col"]
    bias: Float[Tensor, " col"] | None = None


@dataclass(frozen=True)
class Packed:
    """The stored form of a set of words."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, value: frozenset[str], /) -> Packed:
        return cls(tuple(sorted(value)))

    def restore(self) -> frozenset[str]:
        return frozenset(self.words)


@dataclass(frozen=True, eq=False)
class Everything(Stored):
    """A result that has no code of its own for files, with every kind of field the codec knows."""

    kind: ClassVar[str] = "everything"

    plain: Tensor
    shaped: Bool[Tensor, "a b"]
    absent: Int[Tensor, " n"] | None
    there: Int[Tensor, " n"] | None
    several: tuple[Float[Tensor, " n"] | None, ...]
    named: dict[str, Tensor]
    part: Part
    no_part: Part | None
    parts: tuple[Part, ...]
    by_name: dict[str, Part]
    number: float
    whole: int
    text: str
    yes: bool
    nothing: str | None
    place: Path
    level: Literal["head", "layer"]
    order: Literal["given", "reversed"] | tuple[int, ...]
    either: tuple[Literal["given", "reversed"] | tuple[int, ...], ...]
    pairs: tuple[tuple[str, float], ...]
    listed: list[int]
    mapped: Mapping[str, tuple[int, ...]]
    number_or_tensors: tuple[float | tuple[Tensor, ...], ...]
    anything: dict[str, Any]
    words: frozenset[str] = field(metadata=stored_as(Packed))
    default: int = 3
    model: object = field(default=None, metadata=NOT_STORED)
    younger: int = field(default=7, metadata=NOT_IN_0_1)
    provenance: dict[str, Any] = field(default_factory=provenance)


def everything(**changes: Any) -> Everything:
    shared = torch.arange(6.0)
    part = Part("first", torch.randn(2, 3).bfloat16(), torch.randn(3))
    fields: dict[str, Any] = {
        "plain": torch.randn(2, 2, dtype=torch.float64),
        "shaped": torch.tensor([[True, False]]),
        "absent": None,
        "there": torch.arange(3),
        "several": (shared[:4], None, shared[2:], shared),  # views of one memory
        "named": {"b": torch.zeros(0, 2), "a.with.dots": torch.tensor(float("nan")), "c/d": torch.ones(1)},
        "part": part,
        "no_part": None,
        "parts": (part, Part("second", torch.ones(1, 1))),
        "by_name": {"x": part},
        "number": float("inf"),
        "whole": -3,
        "text": "Ünïcödé\n",
        "yes": True,
        "nothing": None,
        "place": Path("a") / "b",
        "level": "layer",
        "order": (2, 0, 1),
        "either": ("given", (1, 2), "reversed"),
        "pairs": (("a", 0.1), ("b", -1e-300)),
        "listed": [3, 1],
        "mapped": {"z": (1, 2), "a": ()},
        "number_or_tensors": (1.5, (torch.ones(2), torch.zeros(1))),
        "anything": {"deep": [1, {"x": None}], "text": "y"},
        "words": frozenset({"pear", "apple"}),
        "default": 4,
        "model": object(),
        "provenance": {"created": "long ago"},
    }
    return Everything(**(fields | changes))


def same(one: Any, other: Any) -> bool:
    """Equal in type and value, tensors bit for bit, in the order of the keys."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(9), other.nan_to_num(9))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def test_a_result_without_code_of_its_own_comes_back_equal(tmp_path: Path) -> None:
    result = everything()
    assert result.save(tmp_path / "x") == tmp_path / "x.json"
    loaded = Everything.load(tmp_path / "x")
    for f in dataclasses.fields(Everything):
        if f.name != "model":
            assert same(getattr(loaded, f.name), getattr(result, f.name)), f.name
    assert loaded.model is None
    assert loaded.provenance == {"created": "long ago"}
    names = load_file(tmp_path / "x.safetensors").keys()
    assert {"plain", "there", "several.0", "named.a.with.dots", "parts.1.weight", "by_name.x.bias"} <= names
    assert not {"absent", "several.1", "parts.1.bias"} & names


def test_what_is_not_in_a_file_is_missed_unless_it_is_newer_than_the_file(tmp_path: Path) -> None:
    path = everything(younger=8).save(tmp_path / "x")
    body = json.loads(path.read_text())
    for name in body.keys() - {"kind", "sha256"}:
        path.write_text(json.dumps({key: value for key, value in body.items() if key != name}))
        if name == "younger":
            assert Everything.load(path).younger == 7
            continue
        with pytest.raises(FileFormatError, match=rf"x\.json is not a complete everything: KeyError\('{name}'\)"):
            Everything.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", "1.5"),
        ("whole", 1.5),
        ("text", None),
        ("level", "model"),
        ("order", "shuffled"),
        ("order", [1.5]),
        ("pairs", [["a"]]),
        ("pairs", "ab"),
        ("several", {"0": "several.0"}),
        ("part", {"weight": "part.weight"}),
        ("part", ["first"]),
        ("named", {"lost": "named.lost"}),
        ("mapped", [["z", [1]]]),
        ("place", 3),
    ],
)
def test_json_of_another_type_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = everything().save(tmp_path / "x")
    body = json.loads(path.read_text())
    assert name in body
    path.write_text(json.dumps(body | {name: value}))
    with pytest.raises(FileFormatError, match=rf"x\.json is not a complete everything: \w+\(.*{name}"):
        Everything.load(path)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_result(tmp_path / "x", kind="holder", tensors={"first": torch.ones(1)}, meta={})
    with pytest.raises(FileFormatError, match=r"is not a complete holder: KeyError\('second'\)"):
        Holder.load(tmp_path / "x")


@dataclass(frozen=True, eq=False)
class Holder(Stored):
    """Two tensors, of which the second is required."""

    kind: ClassVar[str] = "holder"

    first: Tensor | None
    second: Tensor


@dataclass(frozen=True, eq=False)
class Unstorable(Stored):
    """Fields that no file can hold, or whose tensors would have one name."""

    kind: ClassVar[str] = "unstorable"

    strange: complex | None = None
    open: Any = None
    nested: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbered: Mapping[int, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Unstorable(strange=1j), "strange has the type .*complex.*, which cannot be stored"),
        (Unstorable(open=torch.ones(1)), "Tensor is not JSON serializable"),
        (Unstorable(nested={"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.zeros(1)}}), "the same name in its file"),
        (Unstorable(numbered={1: "one"}), "a key of numbered must be of type .*str.*, got int"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_no_pair(tmp_path: Path, value: Unstorable, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        value.save(tmp_path / "x")
    assert not (tmp_path / "x.json").exists()


def test_an_older_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Newer(Stored):
        kind: ClassVar[str] = "newer"

        @classmethod
        def _refusal(cls, body: Mapping[str, Any]) -> str | None:
            return "was written by metaopt-lens 0.1: make it again." if body["old"] else None

    path = save_result(tmp_path / "x", kind="newer", tensors={}, meta={"old": True})
    with pytest.raises(FileFormatError, match=r"x\.json was written by metaopt-lens 0\.1: make it again\.$"):
        Newer.load(path)
    path = save_result(tmp_path / "x", kind="newer", tensors={}, meta={"old": False})
    assert Newer.load(path) == Newer()
    path = save_result(tmp_path / "x", kind="newer", tensors={}, meta={})
    with pytest.raises(FileFormatError, match=r"is not a complete newer: KeyError\('old'\)"):
        Newer.load(path)
