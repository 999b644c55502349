"""Commands that compare in-context learning with finetuning: ``compare`` and ``analyze``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from metaopt_lens._cli_model import Model, NoCache
from metaopt_lens._errors import OptionError


class Form(StrEnum):
    """What goes to the terminal."""

    table = "table"
    json = "json"


class Weights(StrEnum):
    """Floating-point type of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def compare(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(help="Prompts: a .json, .jsonl or text file; two or more queries behind each demonstrations."),
    ],
    lr: Annotated[str, typer.Option(help="Learning rate, or 'auto' to choose on held-out demonstrations.")] = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the demonstrations.")] = 1,
    layer_causal: Annotated[
        bool, typer.Option("--layer-causal", help="Every layer learns from its own early exit (arXiv:2311.07772).")
    ] = False,
    unrelated: Annotated[
        Path | None, typer.Option(help="Text file, a text a line, for the control that learns something else.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Also run everything on permuted weights.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="The published code's choices in the metrics.")
    ] = False,
    dtype: Annotated[Weights, typer.Option(help="Floating-point type of the weights.")] = Weights.float32,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Queries run together (default: by memory).")] = None,
    seed: Annotated[int, typer.Option(help="Of shuffles, random draws and intervals.")] = 0,
    form: Annotated[Form, typer.Option("--format", help="What goes to the terminal.")] = Form.table,
    out: Annotated[Path, typer.Option("--out", help="Folder for comparison.csv, .json and .html.")] = Path(
        "metaopt-lens-out"
    ),
    no_cache: NoCache = False,
) -> None:
    """Learn the demonstrations by gradient descent and compare with reading them, head by head."""
    rate = _rate(lr)

    from metaopt_lens.prompts import load_prompts

    loaded_prompts = load_prompts(prompts)  # before the model, which takes longer
    texts = None if unrelated is None else _lines(unrelated)

    import torch

    from metaopt_lens.analysis import Convention
    from metaopt_lens.experiments import compare_prompts
    from metaopt_lens.models import load_model
    from metaopt_lens.viz import comparison_data, write_comparison_outputs

    found = compare_prompts(
        load_model(model, dtype=getattr(torch, dtype.value), device=device, cache=not no_cache),
        loaded_prompts,
        lr=rate,
        unrelated_texts=texts,
        finetuning={"epochs": epochs, "layer_causal": layer_causal},
        random_weights=random_weights,
        convention=Convention.PUBLISHED if reference else Convention.DEFAULT,
        batch_size=batch_size,
        seed=seed,
    )
    if form is Form.json:
        typer.echo(json.dumps(comparison_data(found.comparison), indent=1, ensure_ascii=False))
    else:
        show_comparison(found)
    for path in write_comparison_outputs(found.comparison, out).values():
        Console(stderr=form is Form.json).print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def show_comparison(found: Any) -> None:
    """Print updates, predictions and similarities."""
    from metaopt_lens._errors import UndefinedMetricError
    from metaopt_lens.viz import accuracies_text, comparison_sentences, comparison_text

    console = Console(highlight=False)
    console.print(repr(found.updates[0]), markup=False, soft_wrap=True)
    if found.learning_rate is not None:
        choice = found.learning_rate
        console.print(f"learning rate {choice.lr:g}, the best of {list(choice.rates)} on held-out demonstrations")
    try:
        console.print(accuracies_text(found.comparison))
        for sentence in comparison_sentences(found.comparison):
            console.print(sentence, markup=False)
    except UndefinedMetricError as error:
        console.print(f"no predictions: {error}", markup=False)
    console.print(comparison_text(found.comparison))


def analyze(
    records: Annotated[Path, typer.Argument(help="Folder with zs/, icl/, ftzs/ and ft/ record files.")],
    form: Annotated[Form, typer.Option("--format", help="What goes to the terminal.")] = Form.table,
    reference: Annotated[bool, typer.Option("--reference", help="Exactly the published programs' choices.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random draws and intervals.")] = 0,
) -> None:
    """Compute all metrics from the published implementation's recorded activations."""
    from metaopt_lens.analysis import Convention
    from metaopt_lens.records import analyze_records

    convention = Convention.PUBLISHED if reference else Convention.DEFAULT
    result = analyze_records(records, convention=convention, seed=seed)
    if form is Form.json:
        typer.echo(json.dumps(result.to_dict(), indent=1))
        return
    from metaopt_lens.viz import frame_text

    console = Console(highlight=False)
    console.print(frame_text(result.to_frame(), title=f"Metrics of {records}"))
    for note in result.notes:
        console.print(note, markup=False)


def _rate(text: str) -> Any:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"--lr must be a number or 'auto', got {text!r}.") from None


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--unrelated {path} cannot be read as text ({error}).") from None
    return [line for line in lines if line]
