"""Sweeps: every combination of models, tasks, labels, shots and rates, each a run of its own, seeds side by side."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from metaopt_lens._configuration import Count, Different, read, read_file, settings
from metaopt_lens._errors import MetaoptLensError, OptionError, SweepError
from metaopt_lens._progress import LOG, Progress
from metaopt_lens._storage import write_text
from metaopt_lens.analysis import LabelWords
from metaopt_lens.experiments._plan import Plan
from metaopt_lens.experiments._run import run_experiment
from metaopt_lens.experiments._run_config import LearningRate, RunConfig, Seeds
from metaopt_lens.experiments._run_inputs import find_run_task, load_run_model
from metaopt_lens.experiments._run_store import RunStore, require_own_version
from metaopt_lens.experiments._sweep_result import MISSING_FILE, SWEEP_FILE, SweepResult
from metaopt_lens.experiments._workers import Workers
from metaopt_lens.tasks import Task, find_task

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
        models, tasks, shots, lr, labels: every combination is a run, but for other than natural labels of open answers;
            a single value may stand without a list.
        tasks_of: the tasks of a model that has others than `tasks`.
        seeds: of every run; a number n stands for seeds 0 to n - 1.
        settings: further fields of every `RunConfig`.
        data: local data by task, where they do not come from the hub; a single folder or file for all tasks whose rows
            are not made.
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
    data: Mapping[str, str] | str = field(default_factory=dict)
    workers: Workers = field(default_factory=Workers)
    labels: Annotated[
        tuple[LabelWords, ...], *_Axis, Field(description="one or several different of natural, flipped, neutral")
    ] = ("natural",)
    tasks_of: Mapping[str, _Names] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fixed = sorted({"model", "task", "shots", "lr", "labels", "seeds", "data"} & set(self.settings))
        if fixed:
            raise OptionError(
                f"{', '.join(fixed)}: a sweep has a list of its own for this, it is not one of the settings."
            )
        nobody = sorted(set(self.tasks_of) - set(self.models))
        if nobody:
            raise OptionError(f"tasks_of names {nobody[0]!r}, which is none of the models {', '.join(self.models)}.")
        strange = [] if isinstance(self.data, str) else sorted(set(self.data) - set(self.all_tasks))
        if strange:
            raise OptionError(f"data are given for task {strange[0]!r}, which is not in the sweep.")

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """The tasks of all models."""
        return tuple(dict.fromkeys(task for model in self.models for task in self.tasks_of.get(model, self.tasks)))

    def runs(self) -> dict[str, RunConfig]:
        """The configurations, by the names of their directories; impossible combinations are in `left_out`.

        Natural labels come first, over all models and tasks: other labels are of use only where those worked.

        Raises:
            OptionError: a value that makes no sense, an unknown task, or only impossible combinations.
        """
        left_out, found = self.left_out(), dict[str, RunConfig]()
        for model, labels, task, shots, lr in self._combinations():
            if (model, task, labels) in left_out:
                continue
            body = {"model": model, "task": task, "shots": shots, "lr": lr, "labels": labels, "seeds": self.seeds}
            data = self._data_of(task)
            config = RunConfig.from_dict(
                {**body, **self.settings, **({} if data is None else {"data": data})}, where="the sweep"
            )
            kind = "" if labels == "natural" else f"-{labels}"
            name = f"{_slug(model)}-{_slug(task)}{kind}-{shots}-shots-lr-{_slug(str(lr))}"
            found[name if name not in found else f"{name}-{config.fingerprint[:8]}"] = config
        if not found:
            raise OptionError(
                f"no run is left: the tasks {', '.join(self.all_tasks)} have open answers, whose labels cannot be "
                f"{' or '.join(self.labels)}. Add labels = 'natural', or a task with label words."
            )
        return found

    def left_out(self) -> tuple[tuple[str, str, LabelWords], ...]:
        """Model, task and labels of the combinations that are impossible: other than natural labels of open answers.

        Raises:
            OptionError: an unknown task.
        """
        combinations = ((model, task, labels) for model, labels, task, _, _ in self._combinations())
        return tuple(
            (model, task, labels)
            for model, task, labels in dict.fromkeys(combinations)
            if labels != "natural" and find_task(task).is_open
        )

    def _combinations(self) -> list[tuple[str, LabelWords, str, int, Any]]:
        return [
            (model, labels, task, shots, lr)
            for labels, model in itertools.product(self.labels, self.models)
            for task, shots, lr in itertools.product(self.tasks_of.get(model, self.tasks), self.shots, self.lr)
        ]

    def _data_of(self, task: str) -> str | None:
        if not isinstance(self.data, str):
            return self.data.get(task)
        return None if find_task(task).make_rows is not None else self.data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SweepConfig:
        """Read a TOML (or JSON) file::

            models = ["tiny"]
            tasks = ["synthetic", "synthetic-3"]
            shots = [4, 8]
            lr = ["auto", 0.01]
            labels = ["natural", "flipped"]
            seeds = 3

            [settings]             # further settings of a run
            queries = 24

            [data]                 # local data by task; or data = "folder", above, for all
            sst2 = "data/sst2.jsonl"

            [tasks_of]             # a model with tasks of its own
            tiny = ["synthetic"]

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
    config: SweepConfig,
    out: str | os.PathLike[str],
    *,
    models: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    recompute_damaged: bool = False,
    progress: bool = True,
) -> SweepResult:
    """Make all runs of a sweep, each in a directory of its own; every seed of every run is a job.

    Jobs are as safe against being killed as runs are: what is finished is kept, and a stopped sweep is resumed.
    On a Dask cluster the jobs of a lost worker are given to others. Runs that fail, or whose model cannot be loaded, do
    not stop the others; the next call tries them again.

    Args:
        config: what to go over.
        out: directory of the results.
        models: only the runs of these models; the rest of the sweep can be made later in the same directory.
        tasks: likewise.
        recompute_damaged: recompute damaged pieces instead of refusing them.
        progress: show a progress bar (on a terminal).

    Returns:
        A `SweepResult`, which reads from `out`.

    Raises:
        OptionError: a value that makes no sense, an unknown task, or models or tasks that the sweep does not have.
        OutputError: `out` cannot be written, holds another sweep, or one that another version of metaopt-lens began.
        SweepError: some runs failed or have no model; all others are finished.
    """
    runs = config.runs()
    known = {name: find_run_task(run) for name, run in runs.items()}
    chosen = _chosen(config, runs, models, tasks)
    store = RunStore(out)
    _prepare(store)
    left_out = [list(combination) for combination in config.left_out()]
    pinned = {"kind": "metaopt-lens sweep", "runs": {name: run.fingerprint for name, run in runs.items()}}
    store.pin(SWEEP_FILE, {**pinned, **({"left_out": left_out} if left_out else {})}, what="sweep")
    result = SweepResult(store.folder, tuple(runs))
    if set(chosen) & set(result.unfinished):
        require_own_version([RunStore(store.folder / name) for name in runs])
    jobs = [
        (name, run, known[name], str(store.folder / name), seed, config.workers.threads, recompute_damaged)
        for name, run in chosen.items()
        for seed in run.seeds
    ]
    failed, missing = dict[str, str](), dict[str, str]()
    if progress:
        LOG.info("sweep: %d runs, %d seeds in all; a line follows when a seed is finished", len(chosen), len(jobs))
    with Progress(len(jobs), "sweep", shown=progress) as shown:
        for done in config.workers.run(_job, jobs):
            shown.advance(1, f"{done.name}, seed {done.seed}")
            if done.problem is not None:
                failed.setdefault(done.name, done.problem)
                if not done.has_model:
                    missing.setdefault(runs[done.name].model, done.problem)
    with store.writing():
        write_text(store.folder / MISSING_FILE, json.dumps(missing, indent=1, ensure_ascii=False) + "\n")
    if failed:
        raise SweepError(_what_failed(runs, len(chosen), failed, missing))
    return result


def _chosen(
    config: SweepConfig, runs: Mapping[str, RunConfig], models: Sequence[str] | None, tasks: Sequence[str] | None
) -> dict[str, RunConfig]:
    for kind, asked, there in (("model", models, config.models), ("task", tasks, config.all_tasks)):
        strange = [name for name in asked or () if name not in there]
        if strange:
            raise OptionError(f"the sweep has no {kind} {strange[0]!r}; it has {', '.join(there)}.")
    found = {
        name: run
        for name, run in runs.items()
        if (models is None or run.model in models) and (tasks is None or run.task in tasks)
    }
    if not found:
        raise OptionError(f"no run of the sweep is of {', '.join(models or ())} on {', '.join(tasks or ())}.")
    return found


def _what_failed(
    runs: Mapping[str, RunConfig], n_chosen: int, failed: Mapping[str, str], missing: Mapping[str, str]
) -> str:
    """The runs that are not there: by model where it could not be loaded, else by name."""
    text = f"{len(failed)} of {n_chosen} runs failed, the others are finished."
    for model, reason in missing.items():
        n = sum(runs[name].model == model for name in failed)
        text += f" The model {model} cannot be loaded ({reason.rstrip('.')}): {n} runs of it are missing."
    broken = [name for name in failed if runs[name].model not in missing]
    if broken:
        text += f" {broken[0]}: {failed[broken[0]]}"
        text += f" Also failed: {', '.join(broken[1:])}." if broken[1:] else ""
    return f"{text} The same command tries only these again."


def _prepare(store: RunStore) -> None:
    if store.read(SWEEP_FILE) is None:
        store.prepare()
    with store.writing():
        store.folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class _Done:
    """A job that came to its end: what went wrong, if anything, and whether there was a model."""

    name: str
    seed: int
    problem: str | None = None
    has_model: bool = True


def _job(name: str, config: RunConfig, task: Task, out: str, seed: int, threads: int, recompute_damaged: bool) -> _Done:
    """One seed of one run, in a worker; the model is loaded only if something is to be made."""
    import torch

    torch.set_num_threads(threads)
    store, model = RunStore(out), None
    if not all(store.is_finished(piece.name) for piece in Plan(config, (seed,)).pieces()):
        model = _model(RunConfig(task="", **{name: getattr(config, name) for name in _MODEL_FIELDS}))
        if isinstance(model, MetaoptLensError):
            return _Done(name, seed, str(model), has_model=False)
    try:
        run_experiment(
            config,
            out,
            model=model,
            task=task,
            only_seeds=[seed],
            recompute_damaged=recompute_damaged,
            progress=False,
        )
    except MetaoptLensError as error:
        return _Done(name, seed, str(error))
    return _Done(name, seed)


@lru_cache(maxsize=1)
def _model(named: RunConfig) -> Any:
    """The model of the last job, which is often that of the next; or why it cannot be loaded."""
    try:
        return load_run_model(named)
    except MetaoptLensError as error:
        return error


def _slug(text: str) -> str:
    return _UNSAFE.sub("-", Path(text).name if text.endswith(".toml") else text).strip("-") or "x"
