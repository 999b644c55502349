"""The stored results of a sweep."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metaopt_lens._errors import FileFormatError
from metaopt_lens.experiments._run_result import ExperimentResult
from metaopt_lens.experiments._run_store import RunStore

if TYPE_CHECKING:
    import pandas as pd

SWEEP_FILE = "sweep.json"
_AXES = ("model", "task", "shots", "lr")


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
        """The results of all runs, by name."""
        return {name: ExperimentResult.load(self.path / name) for name in self.names}

    def table(self, name: str) -> pd.DataFrame:
        """A table (see `ExperimentResult.table`) of all runs below each other, with columns model, task, shots, lr.

        Args:
            name: see `ExperimentResult.table`.
        """
        import pandas as pd

        frames = [
            run.table(name).assign(**{axis: getattr(run.config, axis) for axis in _AXES}) for run in self.runs.values()
        ]
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        return f"SweepResult of {len(self.names)} runs in {self.path}: {', '.join(self.names)}"
