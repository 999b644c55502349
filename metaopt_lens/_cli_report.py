"""The command ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    runs: Annotated[list[Path], typer.Argument(help="One or several directories written by run or sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file (default: report.html in the first directory).")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Write one self-contained page about one or several runs, and every table as CSV beside it."""
    from metaopt_lens.experiments import ExperimentResult
    from metaopt_lens.viz import write_report

    results = [ExperimentResult.load(path) for path in runs]
    written = write_report(results, out or runs[0] / "report.html", title=title)
    console = Console()
    console.print(f"wrote {written['page']}", markup=False, highlight=False, soft_wrap=True)
    tables = len(written) - 1
    console.print(f"and {tables} tables as CSV beside it", markup=False, highlight=False, soft_wrap=True)
