"""One line of a record file to numpy arrays; as a script, a worker process that does so for its parent.

Imports numpy and the JSON parsers only: a worker that imported the package would start slower than it parses.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

simdjson: Any = None
with contextlib.suppress(ImportError):  # optional: three times as fast as orjson on these files
    import simdjson

KINDS = ("zs", "icl", "ftzs", "ft")  # the folders of one recording
QUERY_FIELDS = {"self_attn_out_hiddens": 2, "attn_map": 3, "attn_map_ctx": 2, "attn_q": 2}
DEMO_FIELDS = {"attn_q": 3}
LABELS = ("gold_label", "pred_label")


class LineError(ValueError):
    """What is wrong with a line, without where it stands."""


def parse_line(line: bytes, kind: str) -> dict[str, Any]:
    """Arrays and labels of one line; `kind` is the folder it comes from.

    Arrays are float32 if that holds every number exactly (as the published recordings do), else float64.
    """
    if simdjson is not None:
        try:
            return _parse_fast(line, kind)
        except (ValueError, TypeError, KeyError):
            pass  # whatever is unusual: the other parser says precisely what
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LineError(f"is not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise LineError(f"must be a JSON object, got a {type(record).__name__}")
    parsed: dict[str, Any] = {name: _array(_field(record, name), name, n) for name, n in _wanted(kind).items()}
    for name in LABELS if kind != "ft" else ():
        label = _field(record, name)
        if type(label) is not int:
            raise LineError(f"needs a whole number in '{name}', got {str(label)[:40]}")
        parsed[name] = label
    return parsed


def _wanted(kind: str) -> dict[str, int]:
    """Depth of the arrays to be read. Context scores outside `icl` are one empty column that no metric reads."""
    if kind == "ft":
        return DEMO_FIELDS
    skipped = {"zs": ("attn_map_ctx", "attn_q"), "icl": ("attn_q",), "ftzs": ("attn_map_ctx",)}[kind]
    return {name: depth for name, depth in QUERY_FIELDS.items() if name not in skipped}


def _parse_fast(line: bytes, kind: str) -> dict[str, Any]:
    """The same without a Python object per number, in a third of the time; raises for anything unusual."""
    record = simdjson.Parser().parse(line)
    parsed: dict[str, Any] = {}
    for name, depth in _wanted(kind).items():
        level, shape = [record[name]], []
        for _ in range(depth):
            (size,) = {len(part) for part in level}  # a single length, or ValueError
            shape.append(size)
            level = [part for whole in level for part in whole] if len(shape) < depth else []
        parsed[name] = _smallest(np.frombuffer(record[name].as_buffer(of_type="d")).reshape(shape))
        if not parsed[name].size:
            raise ValueError("empty")
    for label in LABELS if kind != "ft" else ():
        if type(record[label]) is not int:
            raise TypeError(label)
        parsed[label] = record[label]
    return parsed


def _field(record: dict[str, Any], name: str) -> Any:
    if record.get(name) is None:
        what = "no gold label" if name == "gold_label" else f"no field '{name}'"
        raise LineError(f"has {what} (fields: {', '.join(record) or 'none'})")
    return record[name]


def _array(nested: Any, name: str, depth: int) -> NDArray[np.floating[Any]]:
    """Nested lists to an array. Packing row by row takes half the time of ``np.array(nested)``."""
    shape: list[int] = []
    level: list[Any] = [nested]
    for axis in range(depth):
        sizes = {len(part) if isinstance(part, list) else -1 for part in level}
        if len(sizes) != 1:
            raise LineError(f"has a ragged '{name}': lists of {_join(sizes)} entries at nesting depth {axis + 1}")
        size = sizes.pop()
        if size < 1:
            raise LineError(f"needs {depth} levels of non-empty lists in '{name}', level {axis + 1} has none")
        shape.append(size)
        if axis < depth - 1:
            level = [part for whole in level for part in whole]
    array = np.empty(shape)
    row = struct.Struct(f"{shape[-1]}d")
    try:
        for place, numbers in enumerate(level):
            row.pack_into(array.data, place * row.size, *numbers)
    except struct.error:
        raise LineError(f"needs numbers in '{name}', found something else") from None
    if not np.isfinite(array).all():
        raise LineError(f"has a number too large for float64 in '{name}'")
    return _smallest(array)


def _smallest(array: NDArray[np.float64]) -> NDArray[np.floating[Any]]:
    """In float32 if that changes no number."""
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    return single if np.array_equal(single, array) else array


def _join(sizes: set[int]) -> str:
    return " and ".join("no list" if size < 0 else str(size) for size in sorted(sizes)[:4])


def send(parsed: dict[str, Any], stream: IO[bytes]) -> None:
    """Write a parsed line: a JSON head of names, types and shapes, then the arrays' bytes."""
    arrays = {name: value for name, value in parsed.items() if isinstance(value, np.ndarray)}
    head = {
        "arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()],
        "rest": {name: value for name, value in parsed.items() if name not in arrays},
    }
    stream.write(orjson.dumps(head, option=orjson.OPT_APPEND_NEWLINE))
    for array in arrays.values():
        stream.write(array.data.cast("B"))
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any]:
    """Read what `send` wrote; raises `LineError` as the worker did, `EOFError` if it died."""
    line = stream.readline()
    if not line:
        raise EOFError
    head = orjson.loads(line)
    if "error" in head:
        raise LineError(head["error"])
    parsed: dict[str, Any] = dict(head["rest"])
    for name, dtype, shape in head["arrays"]:
        array = np.empty(shape, dtype=dtype)
        view = array.data.cast("B")
        done = 0
        while done < len(view):
            got = stream.readinto(view[done:])  # type: ignore[attr-defined]  # every binary stream but IO has it
            if not got:
                raise EOFError
            done += got
        parsed[name] = array
    return parsed


def main() -> None:
    """Serve requests ``file offset length`` from standard input until it closes.

    The arguments are the record files in the order of `KINDS`; `file` is a place in that list.
    """
    files = [open(path, "rb") for path in sys.argv[1:]]  # noqa: SIM115  # open as long as the process lives
    for request in sys.stdin.buffer:
        place, offset, length = map(int, request.split())
        files[place].seek(offset)
        line = files[place].read(length)
        try:
            send(parse_line(line, KINDS[place]), sys.stdout.buffer)
        except LineError as error:
            head = orjson.dumps({"error": str(error)}, option=orjson.OPT_APPEND_NEWLINE)
            sys.stdout.buffer.write(head)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
