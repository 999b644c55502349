"""Commands that make whole experiments and report on them: ``run``, ``sweep`` and ``report``."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt_lens._errors import OptionError
from metaopt_lens.cli import _options as options
from metaopt_lens.cli._showing import say, say_written, show_run


def run(
    out: Annotated[Path, typer.Option("--out", help="Directory of the results; an unfinished run there is resumed.")],
    model: options.MaybeModel = None,
    task: Annotated[
        str | None, typer.Option(help="sst2, sst5, mr, subj, agnews, cb, word-pairs, synthetic, ..., or a TOML file.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML or JSON file with settings; options given here take precedence.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Local file or folder with the task's rows (default: the hub).", metavar="PATH")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Demonstrations, or as many as fit the context window (default 32).")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many demonstration sets, or their seeds, such as 1,2,5 (default 3).")
    ] = None,
    queries: Annotated[int | None, typer.Option(help="How many rows to use as queries (default: all).")] = None,
    lr: options.MaybeRate = None,
    variant: Annotated[
        options.Variant | None,
        typer.Option(help="Form of the templates: as published, or the released code's one-line form."),
    ] = None,
    selection: Annotated[
        options.Selection | None, typer.Option(help="How demonstrations are chosen (default balanced).")
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
        bool | None, typer.Option("--reference/--no-reference", help="Metrics with the published code's choices.")
    ] = None,
    dtype: options.MaybeWeightsType = None,
    device: options.Device = None,
    n_devices: Annotated[int | None, typer.Option(help="Spread the model over this many devices.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Placement of the modules, such as auto; passed to TransformerLens.")
    ] = None,
    threads: options.Threads = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences run together (default 16).")] = None,
    save_updates: Annotated[
        bool | None, typer.Option("--save-updates/--no-save-updates", help="Store the weight updates as well.")
    ] = None,
    recompute_damaged: options.Recompute = False,
    no_cache: options.NoCache = False,
) -> None:
    """Zero-shot, finetuned and in-context runs of a model on a task, compared head by head and stored."""
    given = dict(locals())
    for name in ("out", "config", "recompute_damaged", "no_cache"):  # not settings of the run
        del given[name]
    read: dict[str, Callable[[str], Any]] = {
        "seeds": options.seeds,
        "lr": options.learning_rate,
        "rules": lambda text: [rule.strip() for rule in text.split(",")],
    }
    changed = {
        name: read[name](value) if name in read else str(value) if isinstance(value, StrEnum) else value
        for name, value in given.items()
        if value is not None
    }

    from metaopt_lens.experiments import RunConfig, load_run_model, run_experiment

    options.quiet_hub()
    body = {**({} if config is None else RunConfig.load(config).to_dict()), **changed}
    for name in ("model", "task"):
        if name not in body:
            raise OptionError(f"run needs --{name} (or --config with a file that names it).")
    settings = RunConfig.from_dict(body, where="the options")
    converted = load_run_model(settings, cache=False) if no_cache else None
    show_run(run_experiment(settings, out, model=converted, recompute_damaged=recompute_damaged))


def sweep(
    file: Annotated[Path, typer.Argument(help="TOML file that lists models, tasks, shots and learning rates.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the results; an unfinished sweep there is resumed.")],
    recompute_damaged: options.Recompute = False,
) -> None:
    """Runs over models, tasks, shots and learning rates, in processes or on a cluster."""
    from metaopt_lens.experiments import SweepConfig, run_sweep

    result = run_sweep(SweepConfig.load(file), out, recompute_damaged=recompute_damaged)
    for found in result.runs.values():
        show_run(found)


def report(
    runs: Annotated[list[Path], typer.Argument(help="One or several directories written by run or sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file (default: report.html in the first directory).")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Write one self-contained page about one or several runs, and every table as CSV."""
    from metaopt_lens.experiments import ExperimentResult
    from metaopt_lens.viz import write_report

    results = [ExperimentResult.load(path) for path in runs]
    written = write_report(results, out or runs[0] / "report.html", title=title)
    say_written([written["page"]])
    say(f"and {len(written) - 1} tables as CSV in the folder of the same name")
