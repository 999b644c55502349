"""Commands that make whole experiments and report on them: ``run``, ``sweep`` and ``report``."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaopt_lens._configuration import read_file
from metaopt_lens._errors import OptionError
from metaopt_lens.cli import _options as options
from metaopt_lens.cli import _run_options as of_run
from metaopt_lens.cli._showing import say, say_written, show_run

if TYPE_CHECKING:
    from metaopt_lens.experiments import RunConfig


_READERS: dict[str, Callable[[str], Any]] = {
    "seeds": options.seeds,
    "lr": options.learning_rate,
    "rules": lambda text: [rule.strip() for rule in text.split(",")],
}


def run(
    out: of_run.Out,
    model: options.MaybeModel = None,
    task: of_run.TaskName = None,
    config: of_run.Config = None,
    data: of_run.Data = None,
    shots: of_run.Shots = None,
    seeds: of_run.Seeds = None,
    queries: of_run.Queries = None,
    lr: options.MaybeRate = None,
    variant: of_run.TemplateVariant = None,
    selection: of_run.Chosen = None,
    labels: of_run.LabelWords = None,
    rules: of_run.Rules = None,
    controls: options.ControlsPreset = None,
    n_label_draws: of_run.LabelDraws = None,
    random_weights: of_run.RandomWeights = None,
    unrelated: of_run.Unrelated = None,
    attribution: of_run.Attribution = None,
    further: of_run.Further = None,
    profile: of_run.Profile = None,
    patch: of_run.Patch = None,
    reference: of_run.Reference = None,
    dtype: options.MaybeWeightsType = None,
    device: options.Device = None,
    n_devices: of_run.Devices = None,
    device_map: of_run.DeviceMap = None,
    threads: options.Threads = None,
    batch_size: of_run.Together = None,
    save_updates: of_run.SaveUpdates = None,
    recompute_damaged: options.Recompute = False,
    no_cache: options.NoCache = False,
) -> None:
    """Zero-shot, finetuned and in-context runs of a model on a task, compared head by head and stored."""
    given = dict(locals())
    for name in ("out", "config", "recompute_damaged", "no_cache"):  # not settings of the run
        del given[name]
    from metaopt_lens.experiments import load_run_model, run_experiment

    options.quiet_hub()
    settings = _settings(config, {name: value for name, value in given.items() if value is not None})
    converted = load_run_model(settings, cache=False) if no_cache else None
    show_run(run_experiment(settings, out, model=converted, recompute_damaged=recompute_damaged))
    _say_what_next(out)


def _say_what_next(out: Path) -> None:
    where = shlex.quote(str(out))
    say(f"next: `metaopt-lens report {where}` writes a page, `metaopt-lens claims {where}` lists published claims")


def _settings(file: Path | None, given: dict[str, Any]) -> RunConfig:
    """A file's settings under those of the command line."""
    from metaopt_lens.experiments import RunConfig

    changed = {
        name: _READERS[name](value) if name in _READERS else str(value) if isinstance(value, StrEnum) else value
        for name, value in given.items()
    }
    body = {**({} if file is None else read_file(file)), **changed}
    for name in ("model", "task"):
        if name not in body:
            raise OptionError(f"run needs --{name} (or --config with a file that names it).")
    return RunConfig.from_dict(body, where="the options" if file is None else f"{file} with the options")


def sweep(
    file: Annotated[Path, typer.Argument(help="TOML file that lists models, tasks, labels, shots, learning rates.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the results; an unfinished sweep there is resumed.")],
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Only the runs of this model; may be given several times.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only the runs on this task; may be given several times.")
    ] = None,
    data: of_run.Data = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes (default: what the file says).")] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Also write the tables of all finished runs as small CSV files.", metavar="DIR"),
    ] = None,
    recompute_damaged: options.Recompute = False,
) -> None:
    """Runs over models, tasks, labels, shots and learning rates, in processes or on a cluster."""
    from metaopt_lens._errors import SweepError
    from metaopt_lens.experiments import SweepConfig, SweepResult, run_sweep

    config = SweepConfig.load(file)
    if data is not None:
        config = dataclasses.replace(config, data=data)
    if workers is not None:
        config = dataclasses.replace(config, workers=dataclasses.replace(config.workers, n=workers))
    failed = None
    try:
        run_sweep(config, out, models=model, tasks=task, recompute_damaged=recompute_damaged)
    except SweepError as error:  # told after what is finished
        failed = error
    result = SweepResult.load(out)
    for found in result.runs.values():
        if found.is_complete:
            show_run(found)
    for name, on, labels in result.left_out:
        if _asked(name, model) and _asked(on, task):
            say(f"left out: {name} on {on} with {labels} labels: the task has open answers")
    unfinished, own = result.unfinished, config.runs()
    if unfinished:
        named = [name for name in unfinished if _asked(own[name].model, model) and _asked(own[name].task, task)]
        say(f"not finished: {len(unfinished)} of {len(own)} runs{': ' if named else ''}{', '.join(named)}")
    if export is not None:
        say_written(result.export(export))
    if failed is not None:
        raise failed
    _say_what_next(out)


def _asked(name: str, only: list[str] | None) -> bool:
    return not only or name in only


def report(
    runs: Annotated[list[Path], typer.Argument(help="One or several directories written by run or sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file (default: report.html in the first directory).")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Write one self-contained page about one or several runs, and every table as CSV."""
    from metaopt_lens.experiments import runs_in
    from metaopt_lens.viz import write_report

    results = [run for path in runs for run in runs_in(path)]
    page, *tables = write_report(results, out or runs[0] / "report.html", title=title).values()
    say_written([page])
    say(f"and {len(tables)} tables as CSV in {tables[0].parent}")
