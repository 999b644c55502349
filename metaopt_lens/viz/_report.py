"""The report of one or several runs: one HTML page that can be read and sent, and every table as CSV."""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metaopt_lens._errors import OptionError
from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens.experiments import ExperimentResult
from metaopt_lens.viz._render import render
from metaopt_lens.viz._report_matrix import matrix_context
from metaopt_lens.viz._report_run import run_context, run_name

_CITATIONS = (
    "Dai, D., Sun, Y., Dong, L., Hao, Y., Ma, S., Sui, Z., Wei, F. (2023). Why Can GPT Learn In-Context? Language "
    "Models Secretly Perform Gradient Descent as Meta-Optimizers. Findings of ACL 2023. arXiv:2212.10559.",
    "Deutch, G., Magar, N., Bar Natan, T., Dar, G. (2024). In-context Learning and Gradient Descent Revisited. NAACL "
    "2024. arXiv:2311.07772.",
    "Nanda, N., Bloom, J. (2022). TransformerLens.",
)
_ROWS_SHOWN = 200


def write_report(
    runs: Sequence[ExperimentResult], path: str | os.PathLike[str], *, title: str | None = None
) -> dict[str, Path]:
    """Write the page and the tables; several runs are compared first, then shown one after the other.

    The page carries everything it needs, its own policy blocks every request, and it prints well.

    Args:
        runs: finished runs.
        path: the HTML file; tables go to a folder of the same name with ``-tables`` instead of the ending.
        title: heading of the page; by default it names the run.

    Returns:
        Paths by name: ``page`` and one entry per table.

    Raises:
        OptionError: no runs, or one that is not finished.
    """
    if not runs:
        raise OptionError("a report needs at least one run.")
    for run in runs:
        if not run.is_complete:
            raise OptionError(f"the run in {run.path} is not finished: run it again to resume it, then report.")
    target, tables = Path(path), _all_tables(runs)
    html = render(
        "report.html.j2",
        heading=title or _title(runs),
        matrix=matrix_context(runs) if len(runs) > 1 else None,
        runs=[run_context(run, number) for number, run in enumerate(runs)],
        tables=[_table(name, frame) for name, frame in tables.items()],
        citations=_CITATIONS,
    )
    written = {"page": write_text(target, html)}
    folder = target.with_name(target.stem + "-tables")
    for name, frame in tables.items():
        with atomic_path(folder / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
        written[name] = folder / f"{name}.csv"
    return written


def _title(runs: Sequence[ExperimentResult]) -> str:
    what = run_name(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    return f"Is in-context learning gradient descent? {what}"


def run_sentences(run: ExperimentResult) -> list[str]:
    """Accuracies of every rule with their intervals, then notes: a run in short, for the terminal.

    Args:
        run: a finished run.
    """
    table, found = run.table("accuracies"), []
    for rule in run.config.rules:
        rows = {row["quantity"]: row for row in table[table["rule"] == rule].to_dict("records")}
        known = [(name, rows[f"accuracy {name}"]) for name in ("ZS", "ICL", "FT") if f"accuracy {name}" in rows]
        texts = [f"{name} {row['value']:.3f} {_bracketed(row)}" for name, row in known]
        if texts:
            found.append(f"{rule}: accuracy {', '.join(texts)}")
    return [*found, *(f"note: {note}" for note in run.notes)]


def _bracketed(row: dict[Any, Any]) -> str:
    return "(no interval)" if pd.isna(row["low"]) else f"[{row['low']:.3f}, {row['high']:.3f}]"


def _all_tables(runs: Sequence[ExperimentResult]) -> dict[str, pd.DataFrame]:
    return {
        name if len(runs) == 1 else f"{number}-{name}": run.table(name)
        for number, run in enumerate(runs)
        for name in run.table_names
    }


def _table(name: str, frame: pd.DataFrame) -> dict[str, Any]:
    """A table to be opened on the page, with its CSV inside the page, compressed."""
    csv = gzip.compress(frame.to_csv(index=False).encode(), mtime=0)
    shown = frame.dropna(axis=1, how="all").head(_ROWS_SHOWN)
    return {"name": name, "n_rows": len(frame), "csv": base64.b64encode(csv).decode(), "shown": shown}
