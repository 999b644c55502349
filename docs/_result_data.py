"""The tables of docs/data, of all folders, and how a run and a number are written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from metaopt_lens.analysis import span_text
from metaopt_lens.experiments import claims_of
from metaopt_lens.experiments._sweep_export import PROVENANCE_FILE
from metaopt_lens.experiments._sweep_result import AXES

KEYS = [*AXES, "directory"]  # what tells runs apart: two folders may hold runs of the same settings
SETTINGS = ("accuracy ZS", "accuracy ICL", "accuracy FT")


class Data:
    """Everything in the folders of exported tables."""

    def __init__(self, folder: Path) -> None:
        found = sorted(folder.rglob(PROVENANCE_FILE), key=lambda file: (len(file.parts), file.as_posix()))
        self.folders = [file.parent for file in found]
        self.expected = tomllib.loads(text) if (text := read(folder / "expected.toml")) else {}
        self.provenance = [json.loads(read(file)) for file in found]
        # The first folder has no name; another is called by its number of queries, in which its runs differ.
        queries = [
            span(sorted({run["config"]["queries"] for run in body["runs"].values()})) for body in self.provenance
        ]
        self.names = [f"{n} queries" if number else "" for number, n in enumerate(queries)]
        self._tables: dict[str, pd.DataFrame] = {}

    def table(self, name: str) -> pd.DataFrame:
        """A table of all folders, read once; empty where there is none."""
        if name not in self._tables:
            self._tables[name] = self._read(name)
        return self._tables[name]

    def _read(self, name: str) -> pd.DataFrame:
        kinds = {axis: str for axis in AXES if axis != "shots"}
        frames = [
            pd.read_csv(file, dtype=kinds, keep_default_na=False, na_values=["", "nan"]).assign(directory=own)
            for folder, own in zip(self.folders, self.names, strict=True)
            if (file := folder / f"{name}.csv").is_file()
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @cached_property
    def claims(self) -> pd.DataFrame:
        """`claims_of` all folders."""
        found = claims_of(self.folders)
        return found.replace({"directory": dict(zip(map(str, self.folders), self.names, strict=True))})

    @cached_property
    def works(self) -> set[tuple[Any, ...]]:
        """The runs (with their rule) in which in-context learning and finetuning are shown to work."""
        shown = self.claims[self.claims["claim"].isin(["learns", "finetunes"]) & (self.claims["verdict"] == "holds")]
        counts = shown.groupby([*KEYS, "rule"])["claim"].nunique()
        return set(counts.index[counts == 2])

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """The entries of ``provenance.json``."""
        return [run for body in self.provenance for run in body["runs"].values()]


def keys_of(rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(rows[[*KEYS, "rule"]].itertuples(index=False, name=None))


def runs_of(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The runs, each with its rule, in the order in which they come."""
    return list(dict.fromkeys(keys_of(table)))


def rows_of(table: pd.DataFrame, key: Sequence[Any]) -> pd.DataFrame:
    for column, value in zip([*KEYS, "rule"], key, strict=False):  # the rule may be left open
        table = table[table[column] == value]
    return table


def place(key: Sequence[Any]) -> list[str]:
    """Model, and task with what else tells the run apart."""
    model, task, shots, _, labels, directory, rule = key
    more = (
        [f"{shots} shots"]
        + [directory] * bool(directory)
        + [f"{labels} labels"] * (labels != "natural")
        + ["layer-causal"] * (rule == "lcgd")
    )
    return [str(model), f"{task} ({', '.join(more)})"]


def listed(keys: Sequence[Sequence[Any]]) -> str:
    return "; ".join(" on ".join(place(key)) for key in keys)


def number(row: Any, value: str, low: str, high: str, form: str = "{:+.3f}") -> str:
    return f"{form.format(float(row[value]))}{span_text(float(row[low]), float(row[high]), form)}"


def span(values: Sequence[Any]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{values[0]} to {values[-1]}"


def count(rows: int | dict[str, int]) -> str:
    """Rows of a task; where they are made by seed, of every seed."""
    return f"{rows}" if isinstance(rows, int) else f"{span(sorted(set(rows.values())))} a seed"


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
