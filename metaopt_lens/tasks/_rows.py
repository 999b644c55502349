"""The rows of a task: from local files, or from the hub."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaopt_lens._errors import DataError
from metaopt_lens.tasks._tables import Record, read_table, suffixes
from metaopt_lens.tasks._task import HubSource, Row, Task, TaskRows

_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


def load_rows(task: Task, data: str | os.PathLike[str] | None = None) -> TaskRows:
    """Read the rows of a task that is not made by a function.

    Args:
        task: the task whose rows are read.
        data: a file, or a folder with ``TASK.jsonl`` or with ``train.*`` and ``validation.*`` (.jsonl, .json, .csv,
            .tsv, .parquet), in the fields of the hub's data set. One file may have a field ``split``; without one, its
            rows are shuffled (always in the same way) and halved. None loads from the hub with `datasets`.

    Raises:
        DataError: no such file, a missing column, a label outside the label words, a hub that cannot be reached.
        FileFormatError: a file that is not what its suffix says.
    """
    return _from_hub(task) if data is None else _from_files(task, Path(data).expanduser())


def _from_files(task: Task, place: Path) -> TaskRows:
    if place.is_dir():
        whole = _named(place, (task.name,))
        train, validation = _named(place, ("train",)), _named(place, _VALIDATION_NAMES)
        if train is not None and validation is not None:
            return TaskRows(
                _rows(task, read_table(train), train.name),
                _rows(task, read_table(validation), validation.name),
                source=f"local files {train.name} and {validation.name}",
            )
        if whole is None:
            raise DataError(
                f"the folder {place} holds neither {task.name}.jsonl nor train.jsonl with validation.jsonl (or "
                f"{', '.join(suffixes()[1:])}), which task {task.name!r} needs."
            )
        place = whole
    if not place.is_file():
        raise DataError(f"there is no file or folder {place} with the data of task {task.name!r}.")
    records = read_table(place)
    source = f"local file {place.name}"
    if any("split" in record for record in records):
        splits: dict[str, list[Record]] = {"train": [], "validation": []}
        for number, record in enumerate(records, start=1):
            name = str(record.get("split", "")).strip().lower()
            kind = "train" if name == "train" else "validation" if name in _VALIDATION_NAMES else None
            if kind is None:
                raise DataError(
                    f"{place.name}, row {number}: the split {name!r} is neither 'train' nor one of "
                    f"{', '.join(map(repr, _VALIDATION_NAMES))}."
                )
            splits[kind].append(record)
        return TaskRows(
            _rows(task, splits["train"], f"{place.name}, train"),
            _rows(task, splits["validation"], f"{place.name}, validation"),
            source=source,
        )
    rows = list(_rows(task, records, place.name))
    random.Random(0).shuffle(rows)
    half = len(rows) // 2
    return TaskRows(tuple(rows[:half]), tuple(rows[half:]), source=f"{source}, divided in halves")


def _named(folder: Path, stems: Sequence[str]) -> Path | None:
    for stem in stems:
        for suffix in suffixes():
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    return None


def _rows(task: Task, records: Sequence[Record], where: str) -> tuple[Row, ...]:
    return tuple(task.row(record, i, f"{where}, row {i + 1}") for i, record in enumerate(records))


def _from_hub(task: Task) -> TaskRows:
    needed = ", ".join((*task.columns, task.label_column))
    locally = f"give a local file or folder (--data on the command line, data= in Python) with the fields {needed}"
    if task.hub is None:
        raise DataError(f"task {task.name!r} is not on the hub: {locally}.")
    loaded = _load(task.hub, task.name, locally)
    splits = {}
    for name in (task.hub.train, task.hub.validation):
        if name not in loaded:
            raise DataError(
                f"{task.hub.path} has no split {name!r} (it has {', '.join(map(repr, loaded))}): name the right one in "
                f"the task's hub source, or {locally}."
            )
        splits[name] = _rows(task, list(loaded[name]), f"{task.hub.path}, {name}")
    config = f" ({task.hub.config})" if task.hub.config else ""
    return TaskRows(
        splits[task.hub.train],
        splits[task.hub.validation],
        source=f"{task.hub.path}{config} on the Hugging Face hub",
        revision=task.hub.revision or _revision(loaded[task.hub.train]),
    )


def _load(hub: HubSource, name: str, locally: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub.path, hub.config, revision=hub.revision)
    # No list of types: the hub's client raises its own, its HTTP library's and built-in errors.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
        raise DataError(
            f"the data of task {name!r} ({hub.path}) could not be loaded from the Hugging Face hub ({first}). "
            f"Without a network, {locally}."
        ) from error


def _revision(split: Any) -> str | None:
    """The commit that the hub's files were read at, if the download addresses tell."""
    for address in getattr(split.info, "download_checksums", None) or ():
        if "@" in address:
            return str(address).split("@", 1)[1].split("/", 1)[0]
    return None
