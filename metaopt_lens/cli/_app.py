"""The command `metaopt-lens`: its commands, its version, and how errors are shown."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer

from metaopt_lens._errors import MetaoptLensError, SweepError
from metaopt_lens.cli import (
    _claims_command,
    _compile_command,
    _experiment_commands,
    _momentum_commands,
    _prompt_commands,
    _record_commands,
)
from metaopt_lens.cli._showing import log_on_stderr, say

_INCOMPLETE = 1  # exit code of a sweep that is finished but for runs that failed
_MISTAKE = 2  # exit code for everything the user can put right; typer's own for bad options


class _Commands(typer.core.TyperGroup):
    """The one place where errors of the library become a line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with log_on_stderr():
                return super().invoke(ctx)
        except MetaoptLensError as error:
            say(f"error: {' '.join(str(error).split())}", to_stderr=True)
            raise typer.Exit(_INCOMPLETE if isinstance(error, SweepError) else _MISTAKE) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    help="Split every attention head's output into what it reads from the query and what it reads from the "
    "demonstrations: z = zero_shot + meta_gradient.",
)
for _command in (  # in the order of the help
    _prompt_commands.demo,
    _prompt_commands.decompose,
    _prompt_commands.compare,
    _compile_command.compile_,
    _experiment_commands.run,
    _experiment_commands.report,
    _experiment_commands.sweep,
    _claims_command.claims,
    _record_commands.analyze,
):
    app.command(_command.__name__.rstrip("_"), short_help=_command.__doc__)(_command)  # short: typer would cut it
app.add_typer(_momentum_commands.app, name="momentum", short_help=_momentum_commands.app.info.help)


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda wanted: _version(wanted), help="Print the version."),
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"metaopt-lens {version('metaopt-lens')}")
        raise typer.Exit
    return wanted


def main() -> None:
    """Entry point of the `metaopt-lens` command."""
    app()
