"""Lines of record files, JSON with large nested lists of numbers, to numpy arrays, in this process or in others.

Imports numpy and simdjson only: a worker process that imports torch starts slower than it parses. simdjson gives the
numbers without a Python object for each, which takes half the time of orjson.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import simdjson
from numpy.typing import NDArray

from metaopt_lens._errors import FileFormatError

Fields = dict[str, Any]  # arrays and integers of one line by field name


class LineError(ValueError):
    """What is wrong with a line, without where it stands."""


@dataclass(frozen=True)
class Layout:
    """What is read of a line: arrays by the depth of their lists, and integers."""

    arrays: Mapping[str, int]
    integers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of a file, and what to read of it."""

    path: str
    number: int
    offset: int
    length: int
    layout: Layout

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}"


def read_line(line: Line) -> Fields | LineError:
    """The fields of a line, or what is wrong with it: as a value, since joblib raises whichever error comes first, and
    the first damaged line of the file is to be named."""
    with open(line.path, "rb") as file:
        file.seek(line.offset)
        text = file.read(line.length)
    try:
        return parse_line(text, line.layout)
    except LineError as error:
        return error


def parse_line(text: bytes, layout: Layout) -> Fields:
    """Arrays and integers of one JSON object.

    Arrays are float32 if that holds every number exactly (as the published recordings do), else float64.

    Raises:
        LineError: whatever the layout does not allow.
    """
    try:
        record = simdjson.Parser().parse(text)
    except ValueError as error:
        raise LineError(f"is not valid JSON ({error})") from None
    if not isinstance(record, simdjson.Object):
        raise LineError(f"must be a JSON object, got {text[:20].decode(errors='replace')}")
    present = set(record)
    parsed: Fields = {}
    for name in (*layout.arrays, *layout.integers):
        if name not in present or (value := record[name]) is None:
            missing = f"field '{name}'" if name in layout.arrays else name.replace("_", " ")
            raise LineError(f"has no {missing} (fields: {', '.join(record) or 'none'})")
        if name in layout.arrays:
            parsed[name] = _array(value, name, layout.arrays[name])
        elif type(value) is int:
            parsed[name] = value
        else:
            raise LineError(f"needs a whole number in '{name}', got {str(value)[:40]}")
    return parsed


def read_blocks(blocks: Iterable[Sequence[Line]], workers: int) -> Iterator[list[Fields]]:
    """The lines of each block, read by joblib's worker processes while the caller works on the block before.

    Two blocks are held at most.

    Args:
        blocks: lines that are needed together.
        workers: processes; 0 reads in this one.

    Raises:
        FileFormatError: a damaged line, with its file and number.
    """
    if not workers:
        for block in blocks:
            yield _required(block, map(read_line, block))
        return
    started: deque[tuple[Sequence[Line], Future[list[Fields | LineError]]]] = deque()
    with ThreadPoolExecutor(1) as pool:  # waits for the processes
        for block in blocks:
            started.append((block, pool.submit(_read_in_processes, block, workers)))
            if len(started) > 1:
                yield _finished(*started.popleft())
        while started:
            yield _finished(*started.popleft())


def _read_in_processes(block: Sequence[Line], workers: int) -> list[Fields | LineError]:
    import joblib

    parallel = joblib.Parallel(n_jobs=workers, backend="loky", batch_size=1)
    return parallel(joblib.delayed(read_line)(line) for line in block)  # type: ignore[no-any-return]


def _finished(block: Sequence[Line], reading: Future[list[Fields | LineError]]) -> list[Fields]:
    try:
        return _required(block, reading.result())
    except BrokenProcessPool:  # a worker could not start or was killed: this process can do it too
        return _required(block, map(read_line, block))


def _required(block: Sequence[Line], results: Iterable[Fields | LineError]) -> list[Fields]:
    found = []
    for line, fields in zip(block, results, strict=True):
        if isinstance(fields, LineError):
            raise FileFormatError(f"{line} {fields}. Repair it, or delete it in all settings.")
        found.append(fields)
    return found


def _array(nested: Any, name: str, depth: int) -> NDArray[np.floating[Any]]:
    shape: list[int] = []
    level: list[Any] = [nested]
    for axis in range(depth):
        sizes = {len(part) if isinstance(part, simdjson.Array) else -1 for part in level}
        if len(sizes) != 1:
            came = " and ".join("no list" if size < 0 else str(size) for size in sorted(sizes)[:4])
            raise LineError(f"has a ragged '{name}': lists of {came} entries at nesting depth {axis + 1}")
        size = sizes.pop()
        if size < 1:
            raise LineError(f"needs {depth} levels of non-empty lists in '{name}', level {axis + 1} has none")
        shape.append(size)
        if axis < depth - 1:
            level = [part for whole in level for part in whole]
    try:
        array = np.frombuffer(nested.as_buffer(of_type="d")).reshape(shape)
    except (TypeError, ValueError):
        raise LineError(f"needs numbers in '{name}', found something else") from None
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    return single if np.array_equal(single, array) else array
