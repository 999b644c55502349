"""The published implementation's record files: which lines they have.

A recording is a folder with ``zs/``, ``icl/``, ``ftzs/`` (one line per query) and ``ft/`` (one line per
demonstration), each holding ``record_info.jsonl``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens._json_lines import Fields, Layout, Line, read_blocks

FILE = "record_info.jsonl"
QUERY_SETTINGS = ("zs", "icl", "ftzs")
_LABELS = ("gold_label", "pred_label")
_OUTPUT = {"self_attn_out_hiddens": 2, "attn_map": 3}
# Context scores outside `icl` are one empty column that no metric reads.
LAYOUTS = {
    "zs": Layout(_OUTPUT, _LABELS),
    "icl": Layout({**_OUTPUT, "attn_map_ctx": 2}, _LABELS),
    "ftzs": Layout({**_OUTPUT, "attn_q": 2}, _LABELS),
    "ft": Layout({"attn_q": 3}),
}
_BUFFER = 1 << 23
_WORTH_WORKERS = 1 << 26  # bytes of JSON below which starting processes costs more than it saves
_ENOUGH_WORKERS = 2  # keep up with the analysis


@dataclass(frozen=True)
class Recording:
    """The lines of a recording's four files, seen to be there, complete and equally many.

    Attributes:
        lines: by the folder they stand in.
        workers: processes that parse them, 0 for none.
    """

    lines: dict[str, tuple[Line, ...]]
    workers: int

    @property
    def n_queries(self) -> int:
        """Lines of each of the three query files."""
        return len(self.lines["zs"])

    def read(self, blocks: Iterable[Sequence[Line]]) -> Iterator[list[Fields]]:
        """The records of each block of lines, the next block being parsed meanwhile."""
        return read_blocks(blocks, self.workers)


def open_recording(directory: str | os.PathLike[str], *, workers: int | None = 0) -> Recording:
    """Find the lines of a recording.

    Args:
        directory: the folder.
        workers: processes that will parse them; None for as many as there are cores, up to 2, unless it is small.

    Raises:
        FileFormatError: a missing, empty or cut file, or settings with unequal numbers of queries.
        OptionError: negative workers.
    """
    root = Path(directory)
    missing = [kind for kind in LAYOUTS if not (root / kind / FILE).is_file()]
    if missing:
        raise FileFormatError(
            f"{root / missing[0] / FILE} does not exist: a recording needs {FILE} in each of the folders zs, icl, "
            f"ftzs and ft (missing: {', '.join(missing)}). Record the missing settings, or name another folder."
        )
    if workers is None:
        size = sum((root / kind / FILE).stat().st_size for kind in LAYOUTS)
        workers = min(os.cpu_count() or 1, _ENOUGH_WORKERS) if size >= _WORTH_WORKERS else 0
    if workers < 0:
        raise OptionError(f"workers must be 0 (this process) or more, got {workers}.")
    lines = {kind: tuple(_find_lines(root / kind / FILE, layout)) for kind, layout in LAYOUTS.items()}
    counts = {kind: len(lines[kind]) for kind in QUERY_SETTINGS}
    if len(set(counts.values())) > 1:
        came = ", ".join(f"{kind} {n}" for kind, n in counts.items())
        raise FileFormatError(
            f"{root}: the settings must hold the same queries, but their numbers of records differ ({came}): "
            "record the shorter ones again, or delete the lines of queries that some lack."
        )
    return Recording(lines, workers)


def _find_lines(path: Path, layout: Layout) -> Iterator[Line]:
    number, start, length = 0, 0, path.stat().st_size
    with path.open("rb") as file:
        for end in [*_newlines(path), length]:
            file.seek(max(start, end - 64))
            tail = file.read(end - file.tell()).rstrip()
            if end > start and (tail or end - start > 64):
                number += 1
                line = Line(str(path), number, start, end - start, layout)
                if not tail.endswith(b"}"):
                    raise FileFormatError(
                        f"{line} is cut short: a record ends with a closing brace, this one with "
                        f"{tail[-20:].decode(errors='replace')!r}. Delete it in all settings, or record again."
                    )
                yield line
            start = end + 1
    if not number:
        raise FileFormatError(f"{path} holds no record: record this setting again.")


def _newlines(path: Path) -> Iterator[int]:
    buffer = bytearray(_BUFFER)
    with path.open("rb", buffering=0) as file:
        base = 0
        while got := file.readinto(buffer):
            at = buffer.find(b"\n", 0, got)
            while at >= 0:
                yield base + at
                at = buffer.find(b"\n", at + 1, got)
            base += got
