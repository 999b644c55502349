"""Directories that claims are read from: of a run, of a sweep, or of exported tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.experiments._claim_table import CLAIMS, Claim
from metaopt_lens.experiments._claims import Tables, evaluate_claims
from metaopt_lens.experiments._run_command import run_command
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._run_result import ExperimentResult
from metaopt_lens.experiments._run_store import RUN_FILE
from metaopt_lens.experiments._sweep_export import PROVENANCE_FILE
from metaopt_lens.experiments._sweep_result import AXES, SWEEP_FILE, runs_in, with_axes

if TYPE_CHECKING:
    import pandas as pd

_MEANS = "set_means"


@dataclass(frozen=True)
class RunNote:
    """Which run a row is of, and how it was made.

    Attributes:
        model, task, shots, lr, labels: of the run.
        command: that repeats it.
        date: day on which it was finished.
        version: of metaopt-lens; several with commas between, if several made it.
    """

    model: str
    task: str
    shots: int
    lr: str
    labels: str
    command: str
    date: str
    version: str


@dataclass(frozen=True)
class ClaimSource:
    """Tables of one or several runs.

    Attributes:
        name: of the directory, as it was given.
        tables: by name; their columns model, task, shots, lr, labels say which run a row is of.
        runs: one note for each.
    """

    name: str
    tables: Tables
    runs: tuple[RunNote, ...]


def claims_of(
    paths: Sequence[str | os.PathLike[str]], *, mixed_versions: bool = False, claims: Sequence[Claim] = CLAIMS
) -> pd.DataFrame:
    """Evaluate published claims on stored runs: `evaluate_claims` with where, how and when each run was made.

    Args:
        paths: directories of runs, of sweeps (their finished runs), or of exported tables.
        mixed_versions: list runs of different versions of metaopt-lens side by side instead of refusing them.
        claims: the rows of the table.

    Returns:
        The columns of `evaluate_claims` and ``directory``, ``command``, ``date``, ``version``.

    Raises:
        FileFormatError: a directory holds no run.
        OptionError: no run is finished, versions are mixed, or no claim can be evaluated.
    """
    import pandas as pd

    if not paths:
        raise OptionError("claims needs a directory that run or sweep has written.")
    sources = [open_source(path) for path in paths]
    if not mixed_versions:
        _require_one_version(sources)
    frames = []
    for source in sources:
        try:
            found = evaluate_claims(source.tables, claims)
        except OptionError as error:
            raise OptionError(f"{source.name}: {error}") from None
        notes = pd.DataFrame([vars(note) for note in source.runs])
        frames.append(found.merge(notes, how="left", on=list(AXES)).assign(directory=source.name))
    return pd.concat(frames, ignore_index=True)


def open_source(path: str | os.PathLike[str]) -> ClaimSource:
    """Find out what a directory holds.

    Args:
        path: of a run, a sweep or exported tables.

    Raises:
        FileFormatError: it holds none of these.
        OptionError: no run in it is finished.
    """
    folder = Path(path)
    if any((folder / name).is_file() for name in (SWEEP_FILE, RUN_FILE)):
        return _of_runs(str(path), runs_in(folder))
    if (folder / PROVENANCE_FILE).is_file():
        return exported(folder)
    raise FileFormatError(
        f"{path} holds no run: give a directory that `metaopt-lens run` or `sweep` has written ({RUN_FILE} or "
        f"{SWEEP_FILE} is in it), or one of exported tables ({PROVENANCE_FILE})."
    )


def exported(folder: Path) -> ClaimSource:
    """Tables as CSV, one for each name, and ``provenance.json`` (see `SweepResult.export`).

    Args:
        folder: where they are.

    Raises:
        FileFormatError: ``provenance.json`` is damaged.
    """
    import pandas as pd

    file = folder / PROVENANCE_FILE
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        runs = tuple(
            _note(RunConfig.from_dict(run["config"]), [run["ended"]], [v["metaopt-lens"] for v in run["versions"]])
            for run in body["runs"].values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{file} does not say which runs the tables are of: {error!r}.") from None

    def table(name: str) -> pd.DataFrame:
        csv = folder / f"{name}.csv"
        if not csv.is_file():
            raise OptionError(f"there is no table {name!r} in {folder}.")
        kinds = {axis: str for axis in AXES if axis != "shots"}
        return pd.read_csv(csv, dtype=kinds, keep_default_na=False, na_values=["", "nan"])

    return ClaimSource(str(folder), table, runs)


def _of_runs(name: str, runs: Sequence[ExperimentResult]) -> ClaimSource:
    import pandas as pd

    finished = [run for run in runs if run.is_complete]
    if not finished:
        raise OptionError(f"no run in {name} is finished: give the same command again to resume it.")
    for run in finished:
        if _MEANS not in run.table_names:
            raise OptionError(
                f"the run in {run.path} has no table {_MEANS!r}, as it was made before there was one: delete "
                f"{run.path / 'pieces' / 'tables'} and give the same command again, which only makes the tables."
            )
    notes = [_note_of(run) for run in finished]

    def table(wanted: str) -> pd.DataFrame:
        frames = [
            with_axes(run, wanted, note) for run, note in zip(finished, notes, strict=True) if wanted in run.table_names
        ]
        if not frames:
            raise OptionError(f"there is no table {wanted!r} in {name}.")
        return pd.concat(frames, ignore_index=True)

    return ClaimSource(name, table, tuple(notes))


def _note(config: RunConfig, ends: Sequence[Any], versions: Sequence[str]) -> RunNote:
    return RunNote(
        model=config.model,
        task=config.task,
        shots=config.shots,
        lr=str(config.lr),
        labels=config.labels,
        command=run_command(config),
        date=str(max(ends, default=""))[:10],
        version=", ".join(sorted(set(versions))),
    )


def _note_of(run: ExperimentResult) -> RunNote:
    logs = [log for log in run.provenance if log["pieces"]]
    versions = [str(log["versions"]["metaopt-lens"]) for log in logs]
    return _note(run.config, [log["ended"] or log["started"] for log in logs], versions)


def _require_one_version(sources: Sequence[ClaimSource]) -> None:
    by_version: dict[str, list[str]] = {}
    for source in sources:
        for version in sorted({run.version for run in source.runs}):
            by_version.setdefault(version, []).append(source.name)
    if len(by_version) > 1:
        listed = "; ".join(f"{version}: {', '.join(names)}" for version, names in by_version.items())
        raise OptionError(
            f"these runs were made by different versions of metaopt-lens ({listed}), whose numbers may differ: make "
            "them again with one, or list them side by side with --mixed-versions (mixed_versions=True)."
        )
