"""The command line. Everything heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from metaopt_lens._cli_compare import analyze, compare, show_comparison
from metaopt_lens._cli_experiments import run, sweep
from metaopt_lens._cli_model import Model, NoCache
from metaopt_lens._cli_report import report
from metaopt_lens._errors import MetaoptLensError, OptionError
from metaopt_lens._threads import torch_threads
from metaopt_lens._types import HeadRef
from metaopt_lens.training._commands import app as momentum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metaopt_lens.decomposition import Decomposition, DecompositionSet
    from metaopt_lens.runs import LabelPrediction

_DEMO_LR = 0.02
_MISTAKE = 2  # exit code for everything the user can put right; typer's own for bad options


class _Commands(typer.core.TyperGroup):
    """The one place where errors of the library become a line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MetaoptLensError as error:
            _say(f"error: {' '.join(str(error).split())}", to_stderr=True)
            raise typer.Exit(_MISTAKE) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    help="Split every attention head's output into what it reads from the query and what it reads from the "
    "demonstrations: z = zero_shot + meta_gradient.",
)


class Format(StrEnum):
    """What `decompose` writes to the terminal."""

    table = "table"
    json = "json"


class DType(StrEnum):
    """Floating-point type of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


Out = Annotated[Path, typer.Option("--out", help="Folder for heads.csv, heads.json and report.html.", metavar="DIR")]
MaybeOut = Annotated[
    Path | None,
    typer.Option("--out", help="Also write heads.csv, heads.json and report.html here.", metavar="DIR"),
]
Top = Annotated[int, typer.Option("--top", min=1, help="How many heads the table lists.")]


app.command()(compare)
app.command()(analyze)
app.command()(run)
app.command()(sweep)
app.command()(report)
app.add_typer(momentum, name="momentum")


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda wanted: _version(wanted), help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
def demo(out: Out = Path("metaopt-lens-out"), top: Top = 12) -> None:
    """The bundled model on a bundled prompt: needs no network and takes seconds."""
    import random

    from metaopt_lens.experiments import compare_prompts, episode_prompts
    from metaopt_lens.models import load_model
    from metaopt_lens.models.tiny import sample_episode
    from metaopt_lens.prompts import ICLPrompt
    from metaopt_lens.viz import write_comparison_outputs

    # The bundled model is so small that more threads only wait for each other, the longer the busier the machine.
    with torch_threads(1):
        episode = sample_episode(random.Random(3), n_demos=8, n_categories=2)
        prompt = ICLPrompt(episode.demos, episode.query, label=episode.answer, candidates=episode.candidates)
        model = load_model("tiny")
        result, answers = _run(model, [prompt], position="last", prepend_bos=None, heads=None)
        _show(result, answers, heads=None, top=top)
        found = compare_prompts(model, episode_prompts(episode), lr=_DEMO_LR, progress=False)
        show_comparison(found)
        _write(result, answers, out, heads=None)
        for path in write_comparison_outputs(found.comparison, out).values():
            _say(f"wrote {path}", to_stderr=False)


@app.command()
def decompose(
    model: Model,
    prompt: Annotated[Path, typer.Option(help="Prompts: a .json, .jsonl or text file.", metavar="FILE")],
    dtype: Annotated[DType, typer.Option(help="Floating-point type of the weights.")] = DType.float32,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda.")] = None,
    heads: Annotated[str | None, typer.Option(help="Only these heads, such as L1H2,L3H7.")] = None,
    position: Annotated[
        str, typer.Option(help="Token of the query to read: last, all, or an index into the prompt.")
    ] = "last",
    form: Annotated[Format, typer.Option("--format", help="What to write to the terminal.")] = Format.table,
    out: MaybeOut = None,
    prepend_bos: Annotated[
        bool | None,
        typer.Option("--prepend-bos/--no-prepend-bos", help="Put BOS first; by default as the model does."),
    ] = None,
    top: Top = 20,
    no_cache: NoCache = False,
) -> None:
    """Split the heads of a model on the prompts in a file."""
    chosen = [HeadRef.parse(name) for name in heads.split(",")] if heads is not None else None
    where = _position(position)

    from metaopt_lens.prompts import load_prompts

    prompts = load_prompts(prompt)  # before the model, which takes longer

    import logging

    import torch
    from huggingface_hub.utils.logging import set_verbosity

    from metaopt_lens.models import load_model

    # A hub that cannot be reached is one error at the end, not a line for every retry.
    set_verbosity(logging.ERROR)
    if sys.stderr.isatty():
        _say(f"loading {model} ...", to_stderr=True)
    loaded = load_model(model, dtype=getattr(torch, dtype.value), device=device, cache=not no_cache)
    result, answers = _run(loaded, prompts, position=where, prepend_bos=prepend_bos, heads=chosen)
    if form is Format.json:
        from metaopt_lens.viz import as_data

        typer.echo(json.dumps(as_data(result, answers, heads=chosen), indent=1, ensure_ascii=False))
    else:
        _show(result, answers, heads=chosen, top=top)
    if out is not None:
        _write(result, answers, out, heads=chosen, to_stderr=form is Format.json)


def _run(
    model: Any, prompts: Sequence[Any], *, position: Any, prepend_bos: bool | None, heads: list[HeadRef] | None
) -> tuple[Decomposition | DecompositionSet, list[LabelPrediction]]:
    from metaopt_lens.decomposition import decompose as run
    from metaopt_lens.models import wrap

    wrapped = wrap(model)
    for ref in heads or ():
        ref.check(wrapped.info.n_layers, wrapped.info.n_heads)
    found = run(wrapped, prompts, position=position, prepend_bos=prepend_bos)
    return (found[0] if len(found) == 1 else found), [item.predict() for item in found]


def _show(
    result: Decomposition | DecompositionSet,
    answers: Sequence[LabelPrediction],
    *,
    heads: list[HeadRef] | None,
    top: int,
) -> None:
    from metaopt_lens.viz import answers_text, decompositions, heads_text, labels_text, prompt_text

    console = Console(highlight=False)
    items = decompositions(result)
    console.print(repr(result), markup=False, soft_wrap=True)
    if len(items) == 1:
        console.print(prompt_text(items[0]), soft_wrap=True)
    for note in dict.fromkeys(note for item in items for note in (item.tokenized.bos_note, item.tokenized.warning)):
        if note:
            console.print(note, style="dim", markup=False, soft_wrap=True)
    if len(items) == 1:
        console.print(labels_text(answers[0]))
    else:
        console.print(answers_text(items, answers))
    console.print(heads_text(result, heads=heads, top=top))


def _write(
    result: Decomposition | DecompositionSet,
    answers: Sequence[LabelPrediction],
    out: Path,
    *,
    heads: list[HeadRef] | None,
    to_stderr: bool = False,
) -> None:
    from metaopt_lens.viz import write_outputs

    for path in write_outputs(result, out, heads=heads, answers=answers):
        _say(f"wrote {path}", to_stderr=to_stderr)


def _position(text: str) -> Any:
    if text in {"last", "all"}:
        return text
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--position must be last, all or a token index, got {text!r}.") from None


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"metaopt-lens {version('metaopt-lens')}")
        raise typer.Exit
    return wanted


def _say(text: str, *, to_stderr: bool) -> None:
    Console(stderr=to_stderr).print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the `metaopt-lens` command."""
    app()
