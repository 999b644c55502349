"""Sweeps: every combination, in processes and on a Dask cluster that loses a worker; the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from runs import SMALL, files_of
from typer.testing import CliRunner

from metaopt_lens import MetaoptLensError
from metaopt_lens._errors import FileFormatError, OptionError, OutputError
from metaopt_lens.cli import app
from metaopt_lens.experiments import ExperimentResult, SweepConfig, SweepResult, run_sweep

_SETTINGS = {"queries": 3, "n_null_draws": 2, "random_weights": False, "rules": ["gd"], "attribution": False}
_TOML = """
models = ["tiny"]
tasks = ["synthetic-2", "synthetic-3"]
shots = 4
lr = 0.02
seeds = 2
[settings]
queries = 3
n_null_draws = 2
random_weights = false
rules = ["gd"]
attribution = false
[workers]
"""


def _sweep(folder: Path, workers: str = "n = 1", text: str = _TOML) -> SweepConfig:
    file = folder / "sweep.toml"
    file.write_text(text + workers)
    return SweepConfig.load(file)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    run_sweep(_sweep(folder), folder / "out", progress=False)
    return folder / "out"


def test_every_combination_is_a_run(reference: Path) -> None:
    result = SweepResult.load(reference)
    assert result.names == ("tiny-synthetic-2-4-shots-lr-0.02", "tiny-synthetic-3-4-shots-lr-0.02")
    assert all(run.is_complete for run in result.runs.values())
    table = result.table("summary")
    assert set(table["task"]) == {"synthetic-2", "synthetic-3"}
    assert set(table["shots"]) == {4}
    assert "2 runs" in repr(result)


@pytest.mark.filterwarnings("ignore")  # what joblib and distributed warn about when processes die is theirs
def test_a_dask_worker_is_killed_and_nothing_is_lost(reference: Path, tmp_path: Path) -> None:
    from distributed import get_client

    config = _sweep(tmp_path, 'engine = "dask"\nn = 2\n[workers.options]\nsilence_logs = 50\n')
    assert config.workers.options == {"silence_logs": logging.CRITICAL}
    killed: list[int] = []

    def kill_a_worker() -> None:
        """Once a first piece is there, and before the last: the worker whose pid a lock tells."""
        while not killed:
            with contextlib.suppress(FileNotFoundError):  # locks and drafts go while they are looked at
                done = list((tmp_path / "out").rglob("pieces/*/prompts/piece.json"))
                locks = list((tmp_path / "out").rglob(".lock.*.gd"))
                pids = [lock.read_text().split(" ")[0] for lock in locks]
                if done and pids and pids[-1]:
                    os.kill(int(pids[-1]), signal.SIGKILL)
                    killed.append(int(pids[-1]))
            time.sleep(0.02)

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    run_sweep(config, tmp_path / "out", progress=False)
    thread.join(5)
    assert killed
    assert killed[0] != os.getpid()
    with pytest.raises(ValueError, match=r"No .*client"):
        get_client(timeout=0.1)  # the cluster is gone
    for name in SweepResult.load(reference).names:
        assert files_of(tmp_path / "out" / name) == files_of(reference / name)
    made = [
        p for run in SweepResult.load(tmp_path / "out").runs.values() for log in run.provenance for p in log["pieces"]
    ]
    assert len(made) == len(list(reference.rglob("piece.json")))  # finished pieces were not made again
    assert not [file for file in (tmp_path / "out").rglob("*") if file.name.startswith((".lock", ".draft"))]


def test_two_processes(reference: Path, tmp_path: Path) -> None:
    run_sweep(_sweep(tmp_path, "n = 2"), tmp_path / "out", progress=False)
    for name in SweepResult.load(reference).names:
        assert files_of(tmp_path / "out" / name) == files_of(reference / name)


def test_one_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    config = SweepConfig(("tiny",), ("synthetic-2",), shots=(99, 4), lr=(0.02,), seeds=(0,), settings=_SETTINGS)
    with pytest.raises(MetaoptLensError, match=r"1 of 2 runs failed, the others are finished. tiny-synthetic-2-99-"):
        run_sweep(config, tmp_path / "out", progress=False)
    assert ExperimentResult.load(tmp_path / "out" / "tiny-synthetic-2-4-shots-lr-0.02").is_complete


def test_the_directory_of_another_sweep_is_refused(reference: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(_sweep(tmp_path), shots=(5,))
    with pytest.raises(OutputError, match=r"holds a run of another sweep: runs.tiny-synthetic-2-5-shots"):
        run_sweep(other, reference, progress=False)
    with pytest.raises(FileFormatError, match="holds no sweep"):
        SweepResult.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('models = ["tiny"]\n', "sweep.toml does not say which tasks"),
        ('model = "tiny"\n', r"sweep.toml has no field 'model'; its fields are models, tasks, .*Did you mean 'models'"),
        (
            'models = ["tiny", "tiny"]\ntasks = ["mr"]\n',
            r"models must be one or several different names, got \['tiny",
        ),
        ('models = []\ntasks = ["mr"]\n', r"models must be one or several different names, got \[\]"),
        (
            'models = "tiny"\ntasks = "mr"\nshots = [0]\n',
            "shots must be one or several different whole numbers of at least 1",
        ),
        (
            'models = "tiny"\ntasks = "mr"\nlr = ["auto", -1]\n',
            r"lr must be .* positive numbers, or 'auto', got \['auto', -1\]",
        ),
        (
            'models = "tiny"\ntasks = "mr"\nseeds = [1, 1]\n',
            r"seeds must be one or several different numbers from 0 on",
        ),
        ('models = "tiny"\ntasks = "mr"\n[settings]\nlr = 1\n', "lr: a sweep has a list of its own for this"),
        (
            'models = "tiny"\ntasks = "mr"\n[data]\ncb = "x"\n',
            "data are given for task 'cb', which is not in the sweep",
        ),
        ('models = "tiny"\ntasks = "mr"\nworkers = 3\n', "workers must be a table, got 3"),
        (
            'models = "tiny"\ntasks = "mr"\n[workers]\nengine = "ray"\n',
            "workers.engine must be one of processes, dask, got 'ray'",
        ),
        ('models = "tiny"\ntasks = "mr"\n[workers]\nn = 0\n', "workers.n must be a whole number of at least 1, got 0"),
        (
            'models = "tiny"\ntasks = "mr"\n[workers]\ncluster = "k8s"\n',
            "workers.cluster must be one of local, slurm, .*, got 'k8s'",
        ),
        (
            'models = "tiny"\ntasks = "mr"\n[workers]\nthread = 2\n',
            r"sweep.toml, \[workers\] has no field 'thread'; its fields are engine, n, .*Did you mean 'threads'",
        ),
    ],
)
def test_wrong_sweeps(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        _sweep(tmp_path, "", text)


def test_settings_of_the_runs_are_checked_too() -> None:
    config = SweepConfig(("tiny",), ("synthetic-2",), settings={"shot": 3})
    with pytest.raises(OptionError, match="the sweep has no field 'shot'; its fields are model, task, shots"):
        config.runs()


def test_tasks_are_looked_up_before_any_run(tmp_path: Path) -> None:
    config = SweepConfig(("tiny",), ("synthetic-2", "sst9"), settings=_SETTINGS)
    with pytest.raises(OptionError, match="there is no task 'sst9'"):
        run_sweep(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# ---- commands -----------------------------------------------------------------------------------------------------


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_run_command(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(SMALL.to_toml())
    out = tmp_path / "out"
    found = _call("run", "--config", file, "--seeds", "1,", "--no-attribution", "--out", out)
    assert found.exit_code == 2  # "1," is no list of numbers
    found = _call("run", "--config", file, "--seeds", 1, "--no-attribution", "--out", out)
    assert found.exit_code == 0, found.output
    assert "gd: accuracy ZS" in found.output
    assert re.search(r"\d\d:\d\d:\d\d tiny on synthetic-2: seed-0/gd, \d+ %, about \d+ s left\n", found.stderr)
    config = ExperimentResult.load(out).config
    assert config == dataclasses.replace(SMALL, seeds=(0,), attribution=False)
    part = tmp_path / "part.json"
    part.write_text(json.dumps({k: v for k, v in SMALL.to_dict().items() if k not in {"model", "task"}}))
    found = _call("run", "--config", part, "--seeds", 1, "--no-attribution", "--out", tmp_path / "part")
    assert "run needs --model" in found.stderr
    named = ("--model", SMALL.model, "--task", SMALL.task)
    found = _call("run", "--config", part, *named, "--seeds", 1, "--no-attribution", "--out", out)
    assert found.exit_code == 0, found.output  # the same run, which is finished
    found = _call("run", "--config", file, "--shots", 5, "--out", out)
    assert found.exit_code == 2
    assert "holds a run of another configuration" in " ".join(found.stderr.split())
    (log,) = ExperimentResult.load(out).provenance
    assert json.dumps(log["command"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "mr"), "run needs --model"),
        (("--model", "tiny", "--task", "mr", "--lr", "fast"), "--lr must be a number or 'auto', got 'fast'"),
        (("--model", "tiny", "--task", "sst9"), "there is no task 'sst9'"),
        (("--model", "tiny", "--task", "mr", "--rules", "sgd"), "the options: rules must be 'gd', 'lcgd' or both"),
        (
            ("--model", "tiny", "--task", "synthetic", "--n-devices", "2", "--shots", "4"),
            "bundled model has no n_devices",
        ),
    ],
)
def test_wrong_commands(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    found = _call("run", *arguments, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_the_sweep_command(reference: Path) -> None:
    found = _call("sweep", reference.parent / "sweep.toml", "--out", reference)  # finished: only shown
    assert found.exit_code == 0, found.output
    assert found.output.count("complete") == 2
