"""A sweep's aggregated tables as small CSV files, and where they come from as JSON: what a repository can hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt_lens._errors import OptionError, OutputError
from metaopt_lens._storage import atomic_path, provenance, write_text
from metaopt_lens.experiments._claim_table import quantities_read
from metaopt_lens.experiments._run_result import ExperimentResult
from metaopt_lens.experiments._sweep_result import AXES, SweepResult

if TYPE_CHECKING:
    import pandas as pd

PROVENANCE_FILE = "provenance.json"
_DIGITS = "%.6g"
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+")  # of an absolute path: they say nothing elsewhere
_SAMPLED = (
    "Demonstrations are drawn from the training rows by the seed, queries from the validation rows, the same for every "
    "seed; held-out rows are further training rows. One file without splits is shuffled, always alike, and halved. "
    "No row stands here: fingerprints are SHA-256 of all rows."
)


def export_sweep(result: SweepResult, folder: str | os.PathLike[str]) -> list[Path]:
    """Write `EXPORTED` tables of the finished runs, one CSV file each, and `PROVENANCE_FILE`.

    Numbers have six significant digits; nothing is per query, and no row of the data is written.

    Args:
        result: a sweep, finished or not.
        folder: made if it is not there; files of the same names are replaced.

    Returns:
        The files.

    Raises:
        OptionError: no run is finished.
        OutputError: `folder` cannot be written.
    """
    tables = {name: make(result) for name, (source, make) in EXPORTED.items() if source in result.table_names}
    if not tables:
        raise OptionError(f"no run of the sweep in {result.path} is finished: there is nothing to export yet.")
    target, written = Path(folder), []
    try:
        for name, table in tables.items():
            with atomic_path(target / f"{name}.csv") as temporary:
                _axes_first(table).to_csv(temporary, index=False, float_format=_DIGITS, lineterminator="\n")
            written.append(target / f"{name}.csv")
        body = json.dumps(sweep_provenance(result), indent=1, ensure_ascii=False)
        return [*written, write_text(target / PROVENANCE_FILE, _FOLDERS.sub("", body) + "\n")]
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror or error}).") from error


def sweep_provenance(result: SweepResult) -> dict[str, Any]:
    """Versions, dates, commands, models, data sets and settings of a sweep; no rows and no hosts.

    Args:
        result: a sweep, finished or not.
    """
    return {
        "exported_with": provenance(),
        "sampled": _SAMPLED,
        "runs": {name: _run(run) for name, run in result.runs.items() if run.is_complete},
        "unfinished": list(result.unfinished),
        "missing_models": result.missing,
        "left_out": [dict(zip(("model", "task", "labels"), found, strict=True)) for found in result.left_out],
    }


def _run(run: ExperimentResult) -> dict[str, Any]:
    logs = run.provenance
    versions = [{name: v for name, v in log["versions"].items() if name != "created"} for log in logs]
    hub = run.task.hub
    return {
        "started": min(log["started"] for log in logs),
        "ended": max(log["ended"] or log["started"] for log in logs),
        "seconds": round(sum(piece["seconds"] for log in logs for piece in log["pieces"].values()), 1),
        "commands": list(dict.fromkeys(_command(log["command"]) for log in logs)),
        "versions": [v for i, v in enumerate(versions) if v not in versions[:i]],
        "config": run.config.deciding(),
        "model": run.model,
        "weights_file": next((log["weights_file"] for log in logs if log.get("weights_file")), None),
        "data": {**run.data, "public": None if hub is None else hub.path},
    }


def _command(arguments: list[str]) -> str:
    """As it is typed: the program by its name."""
    program, *rest = arguments
    name = "metaopt-lens" if Path(program).name == "__main__.py" else Path(program).name
    return " ".join([name, *rest])


def _axes_first(table: pd.DataFrame) -> pd.DataFrame:
    return table[[*AXES, *(column for column in table.columns if column not in AXES)]]


def _whole(name: str) -> tuple[str, Callable[[SweepResult], pd.DataFrame]]:
    return name, lambda result: result.table(name)


def _profile_by_layer(result: SweepResult) -> pd.DataFrame:
    """Mean of every score over the heads of each layer."""
    table = result.table("profile").drop(columns=["name", "head"])
    return table.groupby([*AXES, "layer"], sort=False).mean().reset_index()


def _similarity_by_layer(result: SweepResult) -> pd.DataFrame:
    """The similarity of the updates, and its excess over the main null, mean over the heads of each layer."""
    table = result.table("heads")
    table = table[table["statistic"] == "z total"]
    keys = [*AXES, "rule", "statistic", "main_null", "layer"]
    return table.groupby(keys, sort=False)[["value", "excess"]].mean().reset_index()


def _means_of_claims(result: SweepResult) -> pd.DataFrame:
    """Of `ExperimentResult.table` ``set_means`` what a claim reads, accuracies, and the similarity of heads."""
    table = result.table("set_means")
    own = table["quantity"].isin(quantities_read()) | table["quantity"].str.startswith(
        ("accuracy", "z total", "ceiling")
    )
    return table[own & ~table["quantity"].str.contains("matched|after W_O")]


# By the file's name: the table it needs, and how it is made.
EXPORTED: dict[str, tuple[str, Callable[[SweepResult], Any]]] = {
    **{
        name: _whole(name)
        for name in (
            "accuracies",
            "summary",
            "findings",
            "learning_rates",
            "label_following",
            "ceiling",
            "ladder",
            "order",
            "algebra",
            "attribution_seeds",
            "attribution_recovery",
            "profile_correlations",
            "patch",
        )
    },
    "set_means": ("set_means", _means_of_claims),
    "profile_by_layer": ("profile", _profile_by_layer),
    "similarity_by_layer": ("heads", _similarity_by_layer),
}
