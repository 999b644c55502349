"""The stored results of a sweep."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.experiments._run_result import ExperimentResult
from metaopt_lens.experiments._run_store import RUN_FILE, RunStore

if TYPE_CHECKING:
    import pandas as pd

SWEEP_FILE = "sweep.json"
MISSING_FILE = "missing.json"  # models that could not be loaded the last time, and why
AXES = ("model", "task", "shots", "lr", "labels")
_RENAMED = {"labels": "label_words", "lr": "learning_rate"}  # columns of a run's table that are called as an axis is


def runs_in(path: str | os.PathLike[str]) -> tuple[ExperimentResult, ...]:
    """The run in a directory that ``run`` wrote, or the begun runs in one that ``sweep`` wrote.

    Args:
        path: the directory.

    Raises:
        FileFormatError: it holds neither.
    """
    if (Path(path) / SWEEP_FILE).is_file():
        return tuple(SweepResult.load(path).runs.values())
    return (ExperimentResult.load(path),)


@dataclass(frozen=True, repr=False)
class SweepResult:
    """The stored results of a sweep.

    Attributes:
        path: its directory, with a directory for every run.
        names: of the runs.
    """

    path: Path
    names: tuple[str, ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SweepResult:
        """Open the directory of a sweep, finished or not.

        Args:
            path: the sweep's directory.

        Raises:
            FileFormatError: it holds no sweep.
        """
        body = RunStore(path).read(SWEEP_FILE)
        if body is None or not isinstance(body.get("runs"), dict):
            raise FileFormatError(f"{path} holds no sweep: there is no (valid) {SWEEP_FILE} in it.")
        return cls(Path(path), tuple(body["runs"]))

    @property
    def runs(self) -> dict[str, ExperimentResult]:
        """The results of all runs that are begun, by name."""
        there = (name for name in self.names if (self.path / name / RUN_FILE).is_file())
        return {name: ExperimentResult.load(self.path / name) for name in there}

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Names of the runs that are not finished, or not begun."""
        finished = {name for name, run in self.runs.items() if run.is_complete}
        return tuple(name for name in self.names if name not in finished)

    @property
    def missing(self) -> dict[str, str]:
        """Models that could not be loaded when the sweep was last worked on, and why."""
        return {str(model): str(why) for model, why in (RunStore(self.path).read(MISSING_FILE) or {}).items()}

    @property
    def left_out(self) -> tuple[tuple[str, str, str], ...]:
        """Model, task and labels of the combinations that are impossible (see `SweepConfig.left_out`)."""
        found = (RunStore(self.path).read(SWEEP_FILE) or {}).get("left_out", ())
        return tuple((model, task, labels) for model, task, labels in found)

    @property
    def table_names(self) -> tuple[str, ...]:
        """Names of the tables that at least one finished run has."""
        return tuple(sorted({name for run in self.runs.values() if run.is_complete for name in run.table_names}))

    def table(self, name: str) -> pd.DataFrame:
        """A table (see `ExperimentResult.table`) of the finished runs below each other; those without it add no rows.

        The columns model, task, shots, lr and labels say which run a row is of; a table's own columns of these names
        are called ``learning_rate`` and ``label_words``. `unfinished` names the runs that are not there yet.

        Args:
            name: see `ExperimentResult.table`.

        Raises:
            OptionError: no run is finished, or none has such a table.
        """
        import pandas as pd

        names = self.table_names
        if not names:
            raise OptionError(f"no run of the sweep in {self.path} is finished: run it again to resume it.")
        if name not in names:
            raise OptionError(f"there is no table {name!r}; this sweep has {', '.join(names)}.")
        frames = [
            with_axes(run, name, run.config)
            for run in self.runs.values()
            if run.is_complete and name in run.table_names
        ]
        return pd.concat(frames, ignore_index=True)

    def export(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the aggregated tables of the finished runs as small CSV files, and ``provenance.json``.

        Args:
            folder: made if it is not there; files of the same names are replaced.

        Returns:
            The files.

        Raises:
            OptionError: no run is finished.
            OutputError: `folder` cannot be written.
        """
        from metaopt_lens.experiments._sweep_export import export_sweep

        return export_sweep(self, folder)

    def __repr__(self) -> str:
        return f"SweepResult of {len(self.names)} runs in {self.path}: {', '.join(self.names)}"


def with_axes(run: ExperimentResult, name: str, axes: object) -> pd.DataFrame:
    """A table of a run with the columns `AXES`; own columns of these names are renamed.

    Args:
        run: a finished run.
        name: of the table.
        axes: has an attribute for each of `AXES`.
    """
    return run.table(name).rename(columns=_RENAMED).assign(**{axis: getattr(axes, axis) for axis in AXES})
