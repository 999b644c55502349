"""The commands ``momentum train`` and ``momentum compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from metaopt_lens._errors import OptionError
from metaopt_lens.cli import _options as options
from metaopt_lens.cli._showing import say_written

if TYPE_CHECKING:
    import pandas as pd

    from metaopt_lens.training import TrainingConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train small language models from scratch, with and without momentum attention.",
)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A TOML file, or icl-small, text-small, paper-350m.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of checkpoints and result; an unfinished run is resumed.")],
    eta: options.Eta = None,
    learned: options.Learned = False,
    lags: options.Lags = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the configuration's seed.")] = None,
    steps: options.Steps = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Train one model; resumes where it was interrupted."""
    from metaopt_lens.training import train as run

    changed = _changed(config, eta, learned, lags, steps)
    if seed is not None:
        changed = changed.replace(seed=seed)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    result = run(changed, out, device=device)
    say = _console().print
    for length, value in result.evaluation.perplexity.items():
        say(f"perplexity at {length} tokens: {value:.3f}")
    for n, value in result.evaluation.accuracy.items():
        say(f"accuracy with {n} demonstrations: {value:.3f}")
    say_written([out / "result.json"])


@app.command()
def compare(
    out: Annotated[Path, typer.Option("--out", help="Folder of runs, tables and the page; finished runs are kept.")],
    configs: Annotated[
        list[str] | None, typer.Argument(help="TOML files or shipped names (default: icl-small and text-small).")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Pairs of runs.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each on one CPU thread.")] = 1,
    eta: options.Eta = None,
    learned: options.Learned = False,
    lags: options.Lags = None,
    steps: options.Steps = None,
    device: options.Device = None,
) -> None:
    """Train plain and momentum attention in pairs and report the paired differences with their intervals."""
    from metaopt_lens.training import compare_momentum, write_momentum_page

    chosen = [_changed(name, eta, learned, lags, steps) for name in configs or ["icl-small", "text-small"]]
    names = [c.name for c in chosen]
    if len(set(names)) < len(names):
        raise OptionError(f"every configuration needs its own name, got {', '.join(names)}.")
    console = _console()
    found = []
    for config in chosen:
        comparison = compare_momentum(config, out / config.name, seeds=seeds, jobs=jobs, device=device)
        found.append(comparison)
        control = f" (only the last {config.momentum.lags} tokens: a control)" if config.momentum.lags else ""
        console.print(
            f"\n{config.name}: {len(comparison.seeds)} pairs, momentum{control} minus plain with its 95 % interval"
        )
        console.print(_table(comparison.summary()))
        written = write_momentum_page(found, out / "momentum.html")
    say_written([written])
    console.print("and the tables as CSV and JSON in the same folder")


def _changed(name: str, eta: float | None, learned: bool, lags: int | None, steps: int | None) -> TrainingConfig:
    from metaopt_lens.training import TrainingConfig

    momentum: dict[str, Any] = {} if eta is None else {"eta": eta}
    if learned:
        momentum["learned"] = True
    if lags is not None:
        momentum["lags"] = lags
    return TrainingConfig.load(name).replace(momentum=momentum, optimizer={} if steps is None else {"steps": steps})


def _table(summary: pd.DataFrame) -> Any:
    from rich.table import Column, Table

    names = ("metric", "at", "plain", "momentum", "difference", "interval", "better")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None)
    for row in summary.to_dict("records"):
        table.add_row(
            str(row["metric"]),
            f"{row['at']} {row['by']}",
            f"{row['plain']:.3f}",
            f"{row['momentum']:.3f}",
            f"{row['difference']:+.3f}",
            f"{row['low']:+.3f} to {row['high']:+.3f}",
            str(row["better"]) or "-",
        )
    return table


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 100)  # the table is read, not folded
    return console
