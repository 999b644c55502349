"""The command ``claims``: published claims, evaluated on stored runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from metaopt_lens._errors import OptionError
from metaopt_lens.cli._showing import say, say_written

if TYPE_CHECKING:
    import pandas as pd


def claims(
    runs: Annotated[list[Path], typer.Argument(help="Directories written by run or sweep, or of exported tables.")],
    out: Annotated[Path | None, typer.Option("--out", help="A .csv or .md file for the whole table.")] = None,
    mixed_versions: Annotated[
        bool, typer.Option("--mixed-versions", help="List runs of different versions of metaopt-lens side by side.")
    ] = False,
) -> None:
    """Which published claims hold for these runs, with the interval that decides each."""
    from metaopt_lens.experiments import claims_of

    if out is not None and out.suffix not in (".csv", ".md"):
        raise OptionError(f"--out must end in .csv or .md, got {out}.")
    found = claims_of(runs, mixed_versions=mixed_versions)
    _show(found)
    if out is not None:
        from metaopt_lens._storage import write_text
        from metaopt_lens.experiments import claims_markdown

        text = found.to_csv(index=False) if out.suffix == ".csv" else f"# Claims\n\n{claims_markdown(found)}"
        write_text(out, text)
        say_written([out])


def _show(found: pd.DataFrame) -> None:
    """A table for each model, rule and kind of labels."""
    from metaopt_lens.experiments import claim_blocks
    from metaopt_lens.viz import claims_text

    console = Console(highlight=False)
    for block in claim_blocks(found):
        console.print(claims_text(block, console.width))
        for number, why in enumerate(block.reasons, 1):
            say(f"({number}) {why}")
