"""Settings: every field of every configuration can be explained, and values survive copies, pickles and freezing."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter

from metaopt_lens._configuration import Count, _accepted, _resolved, settings
from metaopt_lens._errors import OptionError
from metaopt_lens.experiments import RunConfig, SweepConfig
from metaopt_lens.tasks import Task, find_task
from metaopt_lens.training import TrainingConfig


def _fields(schema: Mapping[str, Any], whole: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}{name}", _accepted(field, whole)
        yield from _fields(_resolved(field, whole), whole, f"{path}{name}.")


@pytest.mark.parametrize("kind", [RunConfig, SweepConfig, Task, TrainingConfig])
def test_every_field_says_what_it_accepts(kind: type) -> None:
    schema = TypeAdapter(kind).json_schema()
    words = dict(_fields(schema, schema))
    assert len(words) >= 8
    assert not [name for name, text in words.items() if "something else" in text or not text]


@settings
class _Inner:
    depth: Count = 1

    def __post_init__(self) -> None:
        if self.depth == 13:
            raise OptionError("13 is unlucky.")


@settings
class _Box:
    size: Count
    label: str | None = None
    inner: _Inner | None = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "_Box does not say which size."),
        ({"size": 0}, "size must be a whole number of at least 1, got 0."),
        ({"size": 1.0}, "size must be a whole number of at least 1, got 1.0."),
        ({"size": 1, "label": 2}, "label must be a string, got 2."),
        ({"size": 1, "inner": {"depth": 0}}, "inner.depth must be a whole number of at least 1, got 0."),
        ({"size": 1, "inner": {"depth": 13}}, "[inner]: 13 is unlucky."),
        (
            {"size": 1, "inner": {"dept": 2}},
            "_Box, [inner] has no field 'dept'; its fields are depth. Did you mean 'depth'?",
        ),
        ({"size": 1, "inner": "deep"}, "inner must be a table, got 'deep'."),
        ({"size": 0, "label": 2}, "size must be a whole number of at least 1, got 0. label must be a string, got 2."),
        ({"colour": 1, "size": 1}, "_Box has no field 'colour'; its fields are size, label, inner."),
    ],
)
def test_messages(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        _Box(**given)
    assert str(raised.value) == message


def test_settings_are_plain_frozen_dataclasses() -> None:
    box = _Box(2, inner=_Inner(3))
    assert dataclasses.asdict(box) == {"size": 2, "label": None, "inner": {"depth": 3}}
    assert pickle.loads(pickle.dumps(box)) == box == dataclasses.replace(box, size=2)
    assert hash(box) == hash(_Box(2, inner=_Inner(3)))
    with pytest.raises(OptionError, match="size must be"):
        dataclasses.replace(box, size=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        box.size = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(find_task("synthetic-2"))).make_rows(0) == find_task("synthetic-2").make_rows(0)  # type: ignore[misc]


def test_annotations_must_be_defined_above() -> None:
    with pytest.raises(TypeError, match="the annotations of Early must name what is defined above it"):

        @settings
        class Early:
            late: Late

    class Late:
        pass
