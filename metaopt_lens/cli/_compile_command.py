"""The command ``compile``: a prompt's demonstrations as changes of the model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metaopt_lens.cli import _options as options
from metaopt_lens.cli._showing import say_written, show_compiled, show_json


def compile_(
    model: options.Model,
    prompt: Annotated[
        Path,
        typer.Option(
            "--prompt",
            help="A .json, .jsonl or text file. The first prompt is compiled; with four or more queries behind the "
            "same demonstrations, one patch for all is fitted on every second and tested on the others.",
            metavar="FILE",
        ),
    ],
    precision: Annotated[
        str | None,
        typer.Option(help="Precision: model, float32 or float64 (default: the model's, float32 at least)."),
    ] = None,
    ridge: Annotated[
        float, typer.Option(help="Penalty of the patch for all queries, relative to the mean square of an input.")
    ] = 0.1,
    finetuning: Annotated[
        bool,
        typer.Option("--finetuning", help="Compare the patch for all queries with finetuning of the same matrices."),
    ] = False,
    prepend_bos: options.PrependBos = None,
    dtype: options.WeightsType = options.DType.float32,
    device: options.Device = None,
    form: options.Form = options.Format.table,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write compiled.csv, .json and .html, and the patch, here.", metavar="DIR"),
    ] = None,
    no_cache: options.NoCache = False,
) -> None:
    """Compile the demonstrations of a prompt into rank-one changes of the model's own weights."""
    from metaopt_lens.prompts import load_prompts

    prompts = load_prompts(prompt)  # before the model, which takes longer

    from metaopt_lens.experiments import compile_prompts
    from metaopt_lens.viz import compiled_data, write_compiled_outputs

    loaded = options.load(model, dtype, device, no_cache=no_cache)
    found = compile_prompts(
        loaded, prompts, precision=precision, ridge=ridge, finetuning=finetuning, prepend_bos=prepend_bos
    )
    if form is options.Format.json:
        show_json(compiled_data(found))
    else:
        show_compiled(found)
    if out is not None:
        say_written(write_compiled_outputs(found, out).values(), to_stderr=form is options.Format.json)
