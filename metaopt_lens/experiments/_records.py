"""The published implementation's record files: reading and writing.

A recording is a folder with ``zs/``, ``icl/``, ``ftzs/`` (one line per query) and ``ft/`` (one line per
demonstration), each holding ``record_info.jsonl``. Files run to a gigabyte, so lines are read one at a
time, and large ones by worker processes.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens._storage import atomic_path
from metaopt_lens.experiments import _record_lines
from metaopt_lens.experiments._record_lines import KINDS, LineError, parse_line, receive

QuerySetting = Literal["zs", "icl", "ftzs"]
FILE = "record_info.jsonl"
_CHUNK = 1 << 23
_WORTH_WORKERS = 1 << 26  # bytes of JSON below which starting processes costs more than it saves


@dataclass(frozen=True)
class QueryRecord:
    """What one setting (zero-shot, in-context, finetuned) recorded for one query, at its last position.

    Attributes:
        attn_out: output of each self-attention block, after its output projection.
        attn_map: attention scores before the softmax to the query's own tokens (start token not counted).
        gold_label, pred_label: true and predicted class.
        attn_map_ctx: in context only: the scores summed over the heads, to the context ``start token,
            demonstration, separator, demonstration, separator, ...``.
        attn_q: finetuned only: attention query vector, all heads side by side.
    """

    attn_out: Float[Tensor, "layer d_model"]
    attn_map: Float[Tensor, "layer head pos"]
    gold_label: int
    pred_label: int
    attn_map_ctx: Float[Tensor, "layer src"] | None = None
    attn_q: Float[Tensor, "layer d_model"] | None = None


@dataclass(frozen=True)
class DemoRecord:
    """Attention query vectors of one demonstration's tokens (start token first) in the finetuning pass."""

    attn_q: Float[Tensor, "layer src d_model"]


@dataclass(frozen=True)
class Line:
    """Where one record stands."""

    kind: str
    number: int
    offset: int
    length: int


@dataclass(frozen=True)
class RecordIndex:
    """The lines of a recording's four files, checked for being there, complete and equally many."""

    directory: Path
    lines: dict[str, tuple[Line, ...]]

    @property
    def n_queries(self) -> int:
        """Lines of each of the three query files."""
        return len(self.lines["zs"])

    def place(self, kind: str, number: int) -> str:
        """File and line in words, for error messages."""
        return f"{self.directory / kind / FILE}, line {number}"


def index_records(directory: str | os.PathLike[str]) -> RecordIndex:
    """Find the lines of a recording; `FileFormatError` for a missing, empty, cut or unequal file."""
    root = _require_files(directory)
    lines = {kind: tuple(_find_lines(root / kind / FILE, kind)) for kind in KINDS}
    counts = {kind: len(lines[kind]) for kind in KINDS if kind != "ft"}
    if len(set(counts.values())) > 1:
        came = ", ".join(f"{kind} {n}" for kind, n in counts.items())
        raise FileFormatError(
            f"{root}: the settings must hold the same queries, but their numbers of records differ ({came}): "
            "record the shorter ones again, or delete the lines of queries that some lack."
        )
    return RecordIndex(root, lines)


def _require_files(directory: str | os.PathLike[str]) -> Path:
    root = Path(directory)
    missing = [kind for kind in KINDS if not (root / kind / FILE).is_file()]
    if missing:
        raise FileFormatError(
            f"{root / missing[0] / FILE} does not exist: a recording needs {FILE} in each of the folders zs, icl, "
            f"ftzs and ft (missing: {', '.join(missing)}). Record the missing settings, or name another folder."
        )
    return root


Fields = dict[str, Any]  # arrays and labels of one record by field name
ParseLines = Callable[[Iterable[Line]], Iterator[Fields]]


@contextmanager
def open_recording(directory: str | os.PathLike[str], workers: int | None) -> Iterator[tuple[RecordIndex, ParseLines]]:
    """The index of a recording, and a function that parses lines of it.

    Parsing is done by `workers` processes (None: one, or without simdjson as many as there are cores, up to 4;
    0 and small recordings: in this process). An error names file and line.
    """
    root = _require_files(directory)
    if workers is None:
        big = sum((root / kind / FILE).stat().st_size for kind in KINDS) >= _WORTH_WORKERS
        # simdjson keeps up with the analysis from one process; orjson needs all the help there is
        enough = 1 if _record_lines.simdjson is not None else 4
        workers = min(os.cpu_count() or 1, enough) if big and sys.executable else 0
    if workers < 0:
        raise OptionError(f"workers must be 0 (this process) or more, got {workers}.")
    with ExitStack() as stack:
        idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(_worker(root)))
        index = index_records(root)  # while the workers start

        def fetch(line: Line) -> Fields:
            try:
                if not workers:
                    return parse_line(_read(index, line), line.kind)
                process = idle.get()
                try:
                    return _ask(process, line)
                except (EOFError, OSError):  # the worker could not start or died: this process can do it too
                    return parse_line(_read(index, line), line.kind)
                finally:
                    idle.put(process)
            except LineError as error:
                raise FileFormatError(
                    f"{index.place(line.kind, line.number)} {error}. Repair it, or delete it in all settings."
                ) from None

        if not workers:
            yield index, partial(map, fetch)
            return
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(pool.shutdown, cancel_futures=True)
        yield index, partial(_ahead, pool, fetch, 2 * workers)


def read_queries(directory: str | os.PathLike[str], setting: QuerySetting) -> Iterator[QueryRecord]:
    """The records of one query setting, one at a time."""
    with open_recording(directory, workers=0) as (index, parse):
        for number, fields in enumerate(parse(index.lines[setting]), 1):
            arrays = {name: torch.from_numpy(fields[name]) for name in fields if name.startswith(("self", "attn"))}
            out = arrays["self_attn_out_hiddens"]
            _require_equal(index, setting, number, "layers", {t.shape[0] for t in arrays.values()})
            yield QueryRecord(
                attn_out=out,
                attn_map=arrays["attn_map"],
                gold_label=fields["gold_label"],
                pred_label=fields["pred_label"],
                attn_map_ctx=arrays.get("attn_map_ctx"),
                attn_q=arrays.get("attn_q"),
            )


def read_demos(directory: str | os.PathLike[str]) -> Iterator[DemoRecord]:
    """The records of the finetuning pass, one demonstration at a time."""
    with open_recording(directory, workers=0) as (index, parse):
        for fields in parse(index.lines["ft"]):
            yield DemoRecord(torch.from_numpy(fields["attn_q"]))


def write_records(
    directory: str | os.PathLike[str],
    *,
    zs: Iterable[QueryRecord],
    icl: Iterable[QueryRecord],
    ftzs: Iterable[QueryRecord],
    ft: Iterable[DemoRecord],
) -> Path:
    """Write a recording in the published layout, numbers as their float64 text; returns the folder."""
    root = Path(directory)
    for kind, records in (("zs", zs), ("icl", icl), ("ftzs", ftzs)):
        _write(root / kind / FILE, (_query_fields(record, kind) for record in records))
    _write(root / "ft" / FILE, ({"attn_q": _numbers(record.attn_q)} for record in ft))
    return root


def _require_equal(index: RecordIndex, kind: str, number: int, what: str, found: set[int]) -> None:
    if len(found) > 1:
        raise FileFormatError(
            f"{index.place(kind, number)} disagrees with itself about the number of {what}: {sorted(found)}."
        )


def _query_fields(record: QueryRecord, kind: str) -> Fields:
    context = record.attn_map_ctx
    if context is None:
        if kind == "icl":
            raise OptionError("records of the setting icl need attn_map_ctx, the scores to the context; got None.")
        context = torch.zeros(len(record.attn_out), 1)  # a column that readers expect and no metric reads
    fields: Fields = {
        "self_attn_out_hiddens": _numbers(record.attn_out),
        "attn_map": _numbers(record.attn_map),
        "attn_map_ctx": _numbers(context),
        "gold_label": record.gold_label,
        "pred_label": record.pred_label,
    }
    if kind == "ftzs":
        if record.attn_q is None:
            raise OptionError("records of the setting ftzs need attn_q, the attention query vectors; got None.")
        fields["attn_q"] = _numbers(record.attn_q)
    return fields


def _numbers(tensor: Tensor) -> Any:
    return tensor.detach().cpu().double().contiguous().numpy()


def _write(path: Path, records: Iterable[Fields]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for fields in records:
            file.write(orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def _find_lines(path: Path, kind: str) -> Iterator[Line]:
    number, start, length = 0, 0, path.stat().st_size
    with path.open("rb") as file:
        for end in [*_newlines(path), length]:
            file.seek(max(start, end - 64))
            tail = file.read(end - file.tell()).rstrip()
            if end > start and (tail or end - start > 64):
                number += 1
                if not tail.endswith(b"}"):
                    raise FileFormatError(
                        f"{path}, line {number} is cut short: a record ends with a closing brace, this one with "
                        f"{tail[-20:].decode(errors='replace')!r}. Delete it in all settings, or record again."
                    )
                yield Line(kind, number, start, end - start)
            start = end + 1
    if not number:
        raise FileFormatError(f"{path} holds no record: record this setting again.")


def _newlines(path: Path) -> Iterator[int]:
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        base = 0
        while got := file.readinto(buffer):
            at = buffer.find(b"\n", 0, got)
            while at >= 0:
                yield base + at
                at = buffer.find(b"\n", at + 1, got)
            base += got


def _read(index: RecordIndex, line: Line) -> bytes:
    with (index.directory / line.kind / FILE).open("rb") as file:
        file.seek(line.offset)
        return file.read(line.length)


@contextmanager
def _worker(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    files = [str(root / kind / FILE) for kind in KINDS]
    # -P keeps this package's folder off the worker's search path; where the C library is glibc, its memory
    # is kept between lines, as giving tens of megabytes back and taking them anew costs a third of the time
    command = [sys.executable, "-P", _record_lines.__file__, *files]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, pipesize=1 << 20, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            assert process.stdin is not None
            with suppress(OSError):  # closing flushes, and a worker that died cannot read
                process.stdin.close()


def _ask(process: subprocess.Popen[bytes], line: Line) -> Fields:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"%d %d %d\n" % (KINDS.index(line.kind), line.offset, line.length))
    process.stdin.flush()
    return receive(process.stdout)


def _ahead(
    pool: ThreadPoolExecutor, fetch: Callable[[Line], Fields], depth: int, lines: Iterable[Line]
) -> Iterator[Fields]:
    """Like ``pool.map``, but at most `depth` lines ahead of the reader: the parsed arrays are large."""
    waiting: deque[Future[Fields]] = deque()
    for line in lines:
        waiting.append(pool.submit(fetch, line))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
