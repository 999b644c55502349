"""Commands that make whole experiments: ``run`` and ``sweep``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from metaopt_lens._cli_model import MODEL_HELP, NoCache
from metaopt_lens._errors import OptionError

if TYPE_CHECKING:
    from metaopt_lens.experiments import ExperimentResult


class Variant(StrEnum):
    """Form of the published templates."""

    published = "published"
    one_line = "one-line"


class Selection(StrEnum):
    """How demonstrations are chosen."""

    random = "random"
    balanced = "balanced"
    nearest = "nearest"


Recompute = Annotated[
    bool, typer.Option("--recompute-damaged", help="Compute damaged pieces anew instead of refusing them.")
]


def run(
    out: Annotated[Path, typer.Option("--out", help="Directory of the results; an unfinished run there goes on.")],
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    task: Annotated[
        str | None, typer.Option(help="sst2, sst5, mr, subj, agnews, cb, word-pairs, synthetic, ..., or a TOML file.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML or JSON file with settings; options given here count more.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Local file or folder with the task's rows (default: the hub).")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Demonstrations, or as many as fit the context window (default 32).")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many demonstration sets, or their seeds, such as 1,2,5 (default 3).")
    ] = None,
    queries: Annotated[int | None, typer.Option(help="How many rows to ask (default: all).")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rate, or 'auto' (default) to choose it on held-out rows.")
    ] = None,
    variant: Annotated[Variant | None, typer.Option(help="Published templates, or the released code's.")] = None,
    selection: Annotated[
        Selection | None, typer.Option(help="How demonstrations are chosen (default balanced).")
    ] = None,
    rules: Annotated[str | None, typer.Option(help="gd, lcgd, or gd,lcgd (default).")] = None,
    random_weights: Annotated[
        bool | None,
        typer.Option("--random-weights/--no-random-weights", help="Also run on permuted weights (default yes)."),
    ] = None,
    attribution: Annotated[
        bool | None,
        typer.Option("--attribution/--no-attribution", help="Measure every head's effect (default yes)."),
    ] = None,
    reference: Annotated[
        bool | None, typer.Option("--reference/--no-reference", help="The published code's choices in the metrics.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default), bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda.")] = None,
    n_devices: Annotated[int | None, typer.Option(help="Spread the model over this many devices.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Such as auto: passed to TransformerLens.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch (default: its choice; 1 if small).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences run together (default 16).")] = None,
    save_updates: Annotated[
        bool | None, typer.Option("--save-updates/--no-save-updates", help="Store the weight updates as well.")
    ] = None,
    recompute_damaged: Recompute = False,
    no_cache: NoCache = False,
) -> None:
    """Zero-shot, finetuned and in-context runs of a model on a task, compared head by head and stored."""
    given = {
        "model": model,
        "task": task,
        "data": None if data is None else str(data),
        "shots": shots,
        "seeds": None if seeds is None else _seeds(seeds),
        "queries": queries,
        "lr": None if lr is None else _rate(lr),
        "variant": variant,
        "selection": selection,
        "rules": None if rules is None else [rule.strip() for rule in rules.split(",")],
        "random_weights": random_weights,
        "attribution": attribution,
        "reference": reference,
        "dtype": dtype,
        "device": device,
        "n_devices": n_devices,
        "device_map": device_map,
        "threads": threads,
        "batch_size": batch_size,
        "save_updates": save_updates,
    }
    options = {name: str(v) if isinstance(v, StrEnum) else v for name, v in given.items() if v is not None}

    import logging

    from metaopt_lens.experiments import RunConfig, load_run_model, run_experiment

    # A hub that cannot be reached is one error at the end, not a line for every retry.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    base = {} if config is None else RunConfig.load(config).to_dict()
    body = {**base, **options}
    for name in ("model", "task"):
        if name not in body:
            raise OptionError(f"run needs --{name} (or --config with a file that names it).")
    settings = RunConfig.from_dict(body, where="the options")
    converted = load_run_model(settings, cache=False) if no_cache else None
    show_run(run_experiment(settings, out, model=converted, recompute_damaged=recompute_damaged))


def sweep(
    file: Annotated[Path, typer.Argument(help="TOML file that says what to go over.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the results; an unfinished sweep there goes on.")],
    recompute_damaged: Recompute = False,
) -> None:
    """Runs over models, tasks, shots and learning rates, in processes or on a cluster."""
    from metaopt_lens.experiments import SweepConfig, run_sweep

    result = run_sweep(SweepConfig.load(file), out, recompute_damaged=recompute_damaged)
    for found in result.runs.values():
        show_run(found)


def show_run(result: ExperimentResult) -> None:
    """Print what a run found, in short."""
    console = Console(highlight=False)
    console.print(repr(result), markup=False, soft_wrap=True)
    table = result.table("accuracies")
    for rule in result.config.rules:
        rows = {row["quantity"]: row for row in table[table["rule"] == rule].to_dict("records")}
        texts = [
            f"{name} {_interval(rows[f'accuracy {name}'])}"
            for name in ("ZS", "ICL", "FT")
            if f"accuracy {name}" in rows
        ]
        if texts:
            console.print(f"  {rule}: accuracy {', '.join(texts)}", markup=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"  note: {note}", markup=False, soft_wrap=True)
    console.print(f"wrote {result.path}", markup=False, soft_wrap=True)


def _interval(row: dict[Any, Any]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _seeds(text: str) -> Any:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--seeds must be a number or numbers with commas between, got {text!r}.") from None
    return numbers if "," in text else numbers[0]


def _rate(text: str) -> Any:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"--lr must be a number or 'auto', got {text!r}.") from None
