"""Tables from local files: JSON Lines, JSON, CSV, TSV, parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaopt_lens._errors import FileFormatError

Record = dict[str, Any]


def read_table(file: Path) -> list[Record]:
    """The records of a file, by its suffix.

    Raises:
        FileFormatError: another suffix, or the file is not what its suffix says; names the line where there are lines.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise FileFormatError(f"{file} is none of {', '.join(_READERS)}: convert it to one of them.")
    try:
        records = reader(file)
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except OSError as error:
        raise FileFormatError(f"{file} cannot be read ({error.strerror or error}).") from None
    if not records:
        raise FileFormatError(f"{file} holds no rows.")
    return records


def suffixes() -> tuple[str, ...]:
    """The suffixes that `read_table` knows."""
    return tuple(_READERS)


def _json_lines(file: Path) -> list[Record]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise FileFormatError(f"{file}, line {number}: not valid JSON ({error}).") from None
        if not isinstance(record, dict):
            raise FileFormatError(f"{file}, line {number}: a row must be a JSON object.")
        records.append(record)
    return records


def _json(file: Path) -> list[Record]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise FileFormatError(f"{file} is not valid JSON ({error}).") from None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise FileFormatError(f"{file} must be a JSON list of objects, one for each row.")
    return records


def _csv(file: Path, delimiter: str = ",") -> list[Record]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        records = []
        for record in reader:
            if None in record or None in record.values():
                raise FileFormatError(f"{file}, line {reader.line_num}: not as many fields as the header names.")
            records.append(dict(record))
    return records


def _parquet(file: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()  # type: ignore[no-any-return]
    except pyarrow.ArrowException as error:
        raise FileFormatError(f"{file} is not a readable parquet file ({error}).") from None


_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda file: _csv(file, "\t"),
    ".parquet": _parquet,
}
