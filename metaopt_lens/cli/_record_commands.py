"""The command on the published implementation's records: ``analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metaopt_lens.cli import _options as options
from metaopt_lens.cli._showing import show_json


def analyze(
    records: Annotated[Path, typer.Argument(help="Folder with zs/, icl/, ftzs/ and ft/ record files.")],
    form: options.Form = options.Format.table,
    reference: Annotated[bool, typer.Option("--reference", help="Metrics with the published code's choices.")] = False,
    seed: options.Seed = 0,
) -> None:
    """Compute all metrics from the published implementation's recorded activations."""
    from metaopt_lens.analysis import Convention
    from metaopt_lens.records import analyze_records

    convention = Convention.PUBLISHED if reference else Convention.DEFAULT
    result = analyze_records(records, convention=convention, seed=seed)
    if form is options.Format.json:
        show_json(result.to_dict())
        return
    from metaopt_lens.viz import frame_text

    console = Console(highlight=False)
    console.print(frame_text(result.to_frame(), title=f"Metrics of {records}"))
    for note in result.notes:
        console.print(note, markup=False)
