"""A task: how rows of a table become inputs and label words, and where the rows come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.json_schema import WithJsonSchema

from metaopt_lens._configuration import read, read_file, settings
from metaopt_lens._errors import DataError, FileFormatError, OptionError
from metaopt_lens.prompts import Template

_COLUMN = re.compile(r"\{(\w+)\}")


def _as_words(found: Any) -> Any:
    return tuple(map(str, found)) if isinstance(found, list | tuple) else found


_Words = Annotated[tuple[str, ...], BeforeValidator(_as_words), Field(description="a list of words")]
_MakeRows = Annotated[Callable[[int], "TaskRows"], WithJsonSchema({"description": "a function of the seed"})]


@dataclass(frozen=True)
class Row:
    """One row as the task sees it: the input's text and the label word; `index` counts in its split."""

    input: str
    label: str
    index: int


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task: demonstrations come from `train`, queries from `validation`.

    Attributes:
        source: where they come from, in words.
        revision: of the data set on the hub, if known.
        unrelated: texts that have nothing to do with the task, for the control run on unrelated data.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    source: str
    revision: str | None = None
    unrelated: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows."""
        body = [[[r.input, r.label] for r in split] for split in (self.train, self.validation)]
        return hashlib.sha256(json.dumps(body, ensure_ascii=False).encode()).hexdigest()


@settings
class HubSource:
    """A data set on the Hugging Face hub and the names of its splits."""

    path: str
    config: str | None = None
    train: str = "train"
    validation: str = "validation"
    revision: str | None = None


@settings
class Task:
    """What is asked of the model, and of which data.

    Attributes:
        name: as given to ``--task``.
        template: the text around inputs and labels.
        instruction: text before the demonstrations.
        labels: the label words, in the order of the data's class numbers; None for an open vocabulary, where every
            output is its own label (word pairs).
        label_names: what the data call the classes, in the same order; accepted as well as numbers and label words.
        input: how the columns of a row make its input, such as ``"{premise}\\nQuestion: {hypothesis}"``.
        label_column: the column with the label.
        aliases: other names of columns, such as ``{"text": "sentence"}``.
        hub: the data set to load where no local data are given.
        make_rows: a function of the seed that makes the rows, for tasks that are not read from anywhere.
    """

    name: str
    template: Template = field(default_factory=Template)
    labels: _Words | None = None
    label_names: _Words | None = None
    input: str = "{text}"
    label_column: str = "label"
    instruction: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    hub: HubSource | None = None
    make_rows: _MakeRows | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise OptionError("a task needs a name.")
        if not self.columns:
            raise OptionError(
                f"the input {self.input!r} of task {self.name!r} names no column: write it as in '{{text}}'."
            )
        if self.labels is not None:
            if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels) or not all(self.labels):
                raise OptionError(
                    f"task {self.name!r} needs at least two different label words, got {list(self.labels)}; leave "
                    "labels out for an open vocabulary."
                )
            if self.label_names is not None and len(self.label_names) != len(self.labels):
                raise OptionError(
                    f"task {self.name!r} has {len(self.labels)} label words but {len(self.label_names)} label names."
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that make the input."""
        return tuple(_COLUMN.findall(self.input))

    @property
    def is_open(self) -> bool:
        """Whether answers are an open vocabulary: outputs are no classes, which could be balanced or flipped."""
        return self.labels is None and self.make_rows is None

    def one_line(self) -> Task:
        """The released code's variant: a demonstration stands on one line, its parts joined with a space."""
        return dataclasses.replace(
            self,
            template=dataclasses.replace(self.template, input=self.template.input.replace("\n", " ")),
            input=self.input.replace("\n", " "),
        )

    def row(self, record: Mapping[str, Any], index: int, where: str) -> Row:
        """Read one record of a table.

        Args:
            record: one record, by column.
            index: number of the record, kept in the row.
            where: the place that errors name.

        Raises:
            DataError: a column is missing, an input is empty, or the label is none of the task's; `where` names it.
        """
        texts = {name: self._column(record, name, where) for name in self.columns}
        # One pass, so that braces in the data stay what they are.
        text = _COLUMN.sub(lambda m: str(texts[m[1]]).strip(), self.input)
        if not text.strip() or not all(str(t).strip() for t in texts.values()):
            raise DataError(f"{where}: the input of task {self.name!r} is empty.")
        return Row(text.strip(), self._label(self._column(record, self.label_column, where), where), index)

    def _column(self, record: Mapping[str, Any], name: str, where: str) -> Any:
        for key in (name, self.aliases.get(name, name)):
            if record.get(key) is not None:
                return record[key]
        if name in record or self.aliases.get(name) in record:
            raise DataError(f"{where}: column {name!r}, which task {self.name!r} needs, is empty.")
        raise DataError(
            f"{where} has no column {name!r}, which task {self.name!r} needs; its columns are "
            f"{', '.join(map(repr, record)) or 'none'}."
        )

    def _label(self, found: Any, where: str) -> str:
        text = str(found).strip()
        if self.labels is None:
            if not text:
                raise DataError(f"{where}: the label of task {self.name!r} is empty.")
            return text
        if text in self.labels:
            return text
        if text in (self.label_names or ()):
            return self.labels[(self.label_names or ()).index(text)]
        number = text[:-2] if text.endswith(".0") else text
        if number.isdigit() and int(number) < len(self.labels):
            return self.labels[int(number)]
        known = ", ".join(f"{i} {word}" for i, word in enumerate(self.labels))
        raise DataError(f"{where}: the label {found!r} is outside the label words of task {self.name!r} ({known}).")

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides what the task asks, as JSON-able data (a `make_rows` function by its name)."""
        body = dataclasses.asdict(dataclasses.replace(self, make_rows=None, aliases=dict(self.aliases)))
        body["template"] = self.template.to_dict()
        body["make_rows"] = None if self.make_rows is None else getattr(self.make_rows, "__name__", "function")
        return json.loads(json.dumps(body))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], *, where: str = "the task") -> Task:
        """The reverse of `to_dict` (without a `make_rows` function).

        Args:
            body: the fields of a task.
            where: the place that errors name.

        Raises:
            FileFormatError: an unknown field, or a value of the wrong form; `where` names the place.
        """
        values = {name: value for name, value in body.items() if name != "make_rows"}
        return read(cls, values, where=where, error=FileFormatError)


def load_task(path: str | os.PathLike[str]) -> Task:
    """Read a task from a TOML file with the fields of `Task` (``[template]`` and ``[hub]`` as tables).

    Args:
        path: the TOML file.

    Raises:
        FileFormatError: the file is missing, no TOML, or does not describe a task.
    """
    body = read_file(path, what="task file")
    return Task.from_dict({"name": Path(path).stem, **body}, where=str(path))
