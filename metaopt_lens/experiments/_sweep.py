"""Sweeps: every combination of models, tasks, shots and learning rates, each a run of its own, seeds side by side."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from metaopt_lens._configuration import Count, Different, read, read_file, settings
from metaopt_lens._errors import MetaoptLensError, OptionError
from metaopt_lens._progress import Progress
from metaopt_lens.experiments._run import run_experiment
from metaopt_lens.experiments._run_config import LearningRate, RunConfig, Seeds
from metaopt_lens.experiments._run_inputs import find_run_task, load_run_model
from metaopt_lens.experiments._run_store import RunStore
from metaopt_lens.experiments._sweep_result import SWEEP_FILE, SweepResult
from metaopt_lens.experiments._workers import Workers
from metaopt_lens.tasks import Task

_MODEL_FIELDS = ("model", "dtype", "device", "revision", "n_devices", "device_map")
_UNSAFE = re.compile(r"[^A-Za-z0-9.]+")


def _as_list(found: Any) -> Any:
    return (found,) if isinstance(found, str | int | float) else found


_Axis = (BeforeValidator(_as_list), Different)
_Names = Annotated[tuple[str, ...], *_Axis, Field(description="one or several different names")]


@settings
class SweepConfig:
    """What a sweep goes over.

    Attributes:
        models, tasks, shots, lr: every combination is a run; a single value may stand without a list.
        seeds: of every run; a number n stands for seeds 0 to n - 1.
        settings: further fields of every `RunConfig`.
        data: local data by task, where they do not come from the hub.
        workers: where the runs are made; does not decide the results.
    """

    models: _Names
    tasks: _Names
    shots: Annotated[
        tuple[Count, ...], *_Axis, Field(description="one or several different whole numbers of at least 1")
    ] = (32,)
    lr: Annotated[
        tuple[LearningRate, ...], *_Axis, Field(description="one or several different positive numbers, or 'auto'")
    ] = ("auto",)
    seeds: Seeds = (0, 1, 2)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    workers: Workers = field(default_factory=Workers)

    def __post_init__(self) -> None:
        fixed = sorted({"model", "task", "shots", "lr", "seeds", "data"} & set(self.settings))
        if fixed:
            raise OptionError(
                f"{', '.join(fixed)}: a sweep has a list of its own for this, it is not one of the settings."
            )
        strange = sorted(set(self.data) - set(self.tasks))
        if strange:
            raise OptionError(f"data are given for task {strange[0]!r}, which is not in the sweep.")

    def runs(self) -> dict[str, RunConfig]:
        """The configurations, by the names of their directories.

        Raises:
            OptionError: a value that makes no sense.
        """
        found: dict[str, RunConfig] = {}
        for model, task, shots, lr in itertools.product(self.models, self.tasks, self.shots, self.lr):
            body = {"model": model, "task": task, "shots": shots, "lr": lr, "seeds": self.seeds, **self.settings}
            if task in self.data:
                body["data"] = self.data[task]
            config = RunConfig.from_dict(body, where="the sweep")
            name = f"{_slug(model)}-{_slug(task)}-{shots}-shots-lr-{_slug(str(lr))}"
            found[name if name not in found else f"{name}-{config.fingerprint[:8]}"] = config
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SweepConfig:
        """Read a TOML (or JSON) file::

            models = ["tiny"]
            tasks = ["synthetic", "synthetic-3"]
            shots = [4, 8]
            lr = ["auto", 0.01]
            seeds = 3

            [settings]             # further settings of a run
            queries = 24

            [data]                 # local data by task
            sst2 = "data/sst2.jsonl"

            [workers]
            n = 2
            engine = "processes"   # or "dask", with cluster = "slurm", [workers.options] queue = "gpu", ...

        Args:
            path: the TOML file.

        Raises:
            FileFormatError: the file is missing or not valid.
            OptionError: an unknown field, or a value that makes no sense.
        """
        return read(cls, read_file(path), where=str(path))


def run_sweep(
    config: SweepConfig, out: str | os.PathLike[str], *, recompute_damaged: bool = False, progress: bool = True
) -> SweepResult:
    """Make all runs of a sweep, each in a directory of its own; every seed of every run is a job.

    Jobs are as safe against being killed as runs are: what is finished is kept, and a stopped sweep is resumed.
    On a Dask cluster the jobs of a lost worker are given to others.

    Args:
        config: what to go over.
        out: directory of the results.
        recompute_damaged: recompute damaged pieces instead of refusing them.
        progress: show a progress bar (on a terminal).

    Returns:
        A `SweepResult`, which reads from `out`.

    Raises:
        OptionError: a value that makes no sense, an unknown task.
        OutputError: `out` cannot be written, or holds another sweep.
        MetaoptLensError: some runs failed; all others are finished.
    """
    runs = config.runs()
    tasks = {name: find_run_task(run) for name, run in runs.items()}
    store = RunStore(out)
    _prepare(store)
    store.pin(
        SWEEP_FILE,
        {"kind": "metaopt-lens sweep", "runs": {name: run.fingerprint for name, run in runs.items()}},
        what="sweep",
    )
    jobs = [
        (name, run, tasks[name], str(store.folder / name), seed, config.workers.threads, recompute_damaged)
        for name, run in runs.items()
        for seed in run.seeds
    ]
    failed: dict[str, str] = {}
    with Progress(len(jobs), "sweep", shown=progress) as shown:
        for name, seed, problem in config.workers.run(_job, jobs):
            shown.advance(1, f"{name}, seed {seed}")
            if problem is not None:
                failed.setdefault(name, problem)
    if failed:
        first = next(iter(failed))
        raise MetaoptLensError(
            f"{len(failed)} of {len(runs)} runs failed, the others are finished. {first}: {failed[first]}"
            + (f" Also failed: {', '.join(list(failed)[1:])}." if len(failed) > 1 else "")
        )
    return SweepResult(store.folder, tuple(runs))


def _prepare(store: RunStore) -> None:
    if store.read(SWEEP_FILE) is None:
        store.prepare()
    with store.writing():
        store.folder.mkdir(parents=True, exist_ok=True)


def _job(
    name: str, config: RunConfig, task: Task, out: str, seed: int, threads: int, recompute_damaged: bool
) -> tuple[str, int, str | None]:
    """One seed of one run, in a worker, and what went wrong."""
    import torch

    torch.set_num_threads(threads)
    problem = None
    try:
        run_experiment(
            config,
            out,
            model=_model(RunConfig(task="", **{name: getattr(config, name) for name in _MODEL_FIELDS})),
            task=task,
            only_seeds=[seed],
            recompute_damaged=recompute_damaged,
            progress=False,
        )
    except MetaoptLensError as error:
        problem = str(error)
    return name, seed, problem


@lru_cache(maxsize=1)
def _model(named: RunConfig) -> Any:
    """The model of the last job, which is often that of the next."""
    return load_run_model(named)


def _slug(text: str) -> str:
    return _UNSAFE.sub("-", Path(text).name if text.endswith(".toml") else text).strip("-") or "x"
