"""Sweeps: every combination, in processes and on a Dask cluster that loses a worker; the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from runs import SMALL, files_of
from typer.testing import CliRunner

from metaopt_lens import MetaoptLensError, load_tiny
from metaopt_lens._errors import FileFormatError, OptionError, OutputError, SweepError
from metaopt_lens.analysis import head_profile
from metaopt_lens.cli import app
from metaopt_lens.experiments import ExperimentResult, SweepConfig, SweepResult, run_experiment, run_sweep
from metaopt_lens.experiments._claim_table import quantities_read

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
        (
            'models = "tiny"\ntasks = "mr"\nlabels = ["flipped", "wrong"]\n',
            r"labels must be one or several different of natural, flipped, neutral, got \['flipped', 'wrong'\]",
        ),
        ('models = "tiny"\ntasks = "mr"\n[settings]\nlabels = "flipped"\n', "labels: a sweep has a list of its own"),
        (
            'models = "tiny"\ntasks = "mr"\n[tasks_of]\nsmollm2 = ["cb"]\n',
            "tasks_of names 'smollm2', which is none of the models tiny",
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


# ---- labels, tasks of one model, data -----------------------------------------------------------------------------


def test_labels_are_an_axis_and_open_answers_are_left_out_of_it() -> None:
    config = SweepConfig(
        ("tiny", "gpt2"),
        ("sst2", "antonym"),
        labels=("natural", "flipped"),
        tasks_of={"tiny": ("synthetic-2",)},
        data="rows",
        settings=_SETTINGS,
    )
    found = config.runs()
    assert list(found) == [
        "tiny-synthetic-2-32-shots-lr-auto",
        "gpt2-sst2-32-shots-lr-auto",
        "gpt2-antonym-32-shots-lr-auto",
        "tiny-synthetic-2-flipped-32-shots-lr-auto",
        "gpt2-sst2-flipped-32-shots-lr-auto",
    ]
    assert config.left_out() == (("gpt2", "antonym", "flipped"),)
    assert [run.labels for run in found.values()] == ["natural", "natural", "natural", "flipped", "flipped"]
    assert {run.task: run.data for run in found.values()} == {"synthetic-2": None, "sst2": "rows", "antonym": "rows"}
    with pytest.raises(OptionError, match=r"no run is left: the tasks antonym have open answers, .* cannot be flipped"):
        SweepConfig(("gpt2",), ("antonym",), labels=("flipped",)).runs()


# ---- models that are not there, other versions, export --------------------------------------------------------------


_ATLAS = """
models = ["tiny", "MISSING"]
tasks = ["synthetic-2", "antonym"]
shots = 4
lr = 0.02
seeds = 2
labels = ["natural", "flipped"]
[tasks_of]
tiny = ["synthetic-2"]
"MISSING" = ["synthetic-2", "antonym"]
[data]
antonym = "no such file"
[settings]
queries = 4
held_out = 6
n_null_draws = 2
rules = ["gd"]
attribution = false
profile = true
patch = true
further = true
"""


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of which one model's folder does not exist, made by the command, with its export."""
    folder = tmp_path_factory.mktemp("atlas")
    file = folder / "atlas.toml"
    file.write_text(_ATLAS.replace("MISSING", str(folder / "no-model")))
    found = _call("sweep", file, "--out", folder / "out", "--export", folder / "tables")
    assert found.exit_code == 1, found.output
    (folder / "stdout").write_text(found.stdout)
    (folder / "stderr").write_text(" ".join(found.stderr.split()))
    return folder


def test_a_model_that_is_not_there_is_listed_and_the_rest_goes_on(atlas: Path) -> None:
    result = SweepResult.load(atlas / "out")
    gone = str(atlas / "no-model")
    assert list(result.missing) == [gone]
    assert {name: run.is_complete for name, run in result.runs.items()} == {
        "tiny-synthetic-2-4-shots-lr-0.02": True,
        "tiny-synthetic-2-flipped-4-shots-lr-0.02": True,
    }
    assert len(result.unfinished) == 3
    assert result.left_out == ((gone, "antonym", "flipped"),)
    said = (atlas / "stderr").read_text()
    assert "3 of 5 runs failed, the others are finished." in said
    assert f"The model {gone} cannot be loaded (" in said
    assert "3 runs of it are missing. The same command tries only these again." in said
    shown = (atlas / "stdout").read_text()
    assert f"left out: {gone} on antonym with flipped labels: the task has open answers" in shown
    assert "not finished: 3 of 5 runs" in shown


def test_the_second_call_makes_only_what_is_missing(atlas: Path) -> None:
    result = SweepResult.load(atlas / "out")
    logs = {name: len(run.provenance) for name, run in result.runs.items()}
    config = SweepConfig.load(atlas / "atlas.toml")
    with pytest.raises(SweepError, match="3 of 3 runs failed"):
        run_sweep(config, atlas / "out", models=[str(atlas / "no-model")], progress=False)
    run_sweep(config, atlas / "out", models=["tiny"], progress=False)  # all there: no error, and nothing made
    assert {name: len(run.provenance) for name, run in result.runs.items()} == logs
    with pytest.raises(OptionError, match="the sweep has no task 'mr'; it has synthetic-2, antonym"):
        run_sweep(config, atlas / "out", tasks=["mr"], progress=False)


def test_a_part_of_a_sweep_is_made_and_the_rest_later(reference: Path, tmp_path: Path) -> None:
    config = _sweep(tmp_path)
    part = run_sweep(config, tmp_path / "out", tasks=["synthetic-3"], progress=False)
    assert part.unfinished == ("tiny-synthetic-2-4-shots-lr-0.02",)
    assert set(part.table("summary")["task"]) == {"synthetic-3"}
    whole = run_sweep(config, tmp_path / "out", progress=False)
    assert whole.unfinished == ()
    for name in whole.names:
        assert files_of(tmp_path / "out" / name) == files_of(reference / name)


def test_versions_are_not_mixed(reference: Path, tmp_path: Path) -> None:
    """A directory whose pieces another version made: finished it is read, unfinished it is refused."""
    shutil.copytree(reference, tmp_path / "out")
    for log in (tmp_path / "out").rglob("provenance/*.json"):
        body = json.loads(log.read_text())
        body["versions"]["metaopt-lens"] = "0.0.9"
        log.write_text(json.dumps(body))
    config = _sweep(tmp_path)
    assert run_sweep(config, tmp_path / "out", progress=False).unfinished == ()
    shutil.rmtree(tmp_path / "out" / "tiny-synthetic-3-4-shots-lr-0.02" / "pieces" / "tables")
    ours = importlib.metadata.version("metaopt-lens")
    message = rf"holds pieces made by metaopt-lens 0\.0\.9, and this is {re.escape(ours)}.*another directory \(--out\)"
    with pytest.raises(OutputError, match=message):
        run_sweep(config, tmp_path / "out", progress=False)
    run = config.runs()["tiny-synthetic-3-4-shots-lr-0.02"]
    with pytest.raises(OutputError, match=message):
        run_experiment(run, tmp_path / "out" / "tiny-synthetic-3-4-shots-lr-0.02", progress=False)


def test_the_export_is_the_tables_with_their_origin_and_no_rows(atlas: Path) -> None:
    result, folder = SweepResult.load(atlas / "out"), atlas / "tables"
    names = {file.stem for file in folder.glob("*.csv")}
    assert {"accuracies", "summary", "findings", "label_following", "ceiling", "patch", "profile_by_layer"} <= names
    for name in names & set(result.table_names) - {"set_means"}:
        read, stored = pd.read_csv(folder / f"{name}.csv"), result.table(name)
        assert list(read.columns[:5]) == ["model", "task", "shots", "lr", "labels"]
        assert len(read) == len(stored)
        for column in stored.select_dtypes("float"):
            np.testing.assert_allclose(read[column].astype(float), stored[column].astype(float), rtol=1e-5)
    means, whole = pd.read_csv(folder / "set_means.csv"), result.table("set_means")
    read_by_claims = whole["quantity"].isin(quantities_read())
    assert set(whole["quantity"][read_by_claims]) <= set(means["quantity"]) < set(whole["quantity"])
    kept = whole[whole["quantity"].isin(set(means["quantity"]))]
    np.testing.assert_allclose(means[["value", "excess"]], kept[["value", "excess"]], rtol=1e-5, atol=1e-12)
    followed = pd.read_csv(folder / "label_following.csv")
    assert set(followed["label_words"]) == {"natural", "flipped"}  # of the demonstrations; `labels` is the run's
    assert followed["learning_rate"].nunique() > 1  # the rates that were tried; `lr` is the run's
    text = "".join(file.read_text() for file in folder.iterdir())
    assert str(atlas) not in text
    prompts = result.runs["tiny-synthetic-2-4-shots-lr-0.02"].prompts(0)
    asked = json.loads((folder / "provenance.json").read_text())
    assert not any(f'"{prompt.query}"' in text or f",{prompt.query}," in text for prompt in prompts.prompts)
    assert set(asked["runs"]) == set(result.runs)
    first = asked["runs"]["tiny-synthetic-2-4-shots-lr-0.02"]
    assert first["model"]["fingerprint"] == result.runs["tiny-synthetic-2-4-shots-lr-0.02"].model["fingerprint"]
    assert first["versions"][0]["metaopt-lens"] == importlib.metadata.version("metaopt-lens")
    assert list(asked["missing_models"]) == ["no-model"]
    assert asked["unfinished"]


def test_a_sweep_without_finished_runs_has_no_tables(tmp_path: Path) -> None:
    config = SweepConfig(("tiny",), ("synthetic-2",), shots=(99,), lr=(0.02,), seeds=(0,), settings=_SETTINGS)
    with pytest.raises(SweepError, match="1 of 1 runs failed"):
        run_sweep(config, tmp_path / "out", progress=False)
    result = SweepResult.load(tmp_path / "out")
    with pytest.raises(OptionError, match=r"no run of the sweep in .* is finished: run it again to resume it"):
        result.table("summary")
    with pytest.raises(OptionError, match="there is nothing to export yet"):
        result.export(tmp_path / "tables")


# ---- head profile and patch as pieces -------------------------------------------------------------------------------


def test_the_profile_of_a_run_is_that_of_its_prompts(atlas: Path) -> None:
    run = SweepResult.load(atlas / "out").runs["tiny-synthetic-2-4-shots-lr-0.02"]
    scores = [
        head_profile(
            load_tiny(),
            run.prompts(seed).prompts,
            comparison=run.comparison("gd", seed),
            exact=False,
            function_vectors=False,
            seed=seed,
        ).to_frame()
        for seed in run.seeds
    ]
    table = run.table("profile")
    assert "function_vector" not in table
    for name in ("mass", "meta_gradient_logit", "first_order", "task_learning", "cosine"):
        expected = (scores[0][name] + scores[1][name]) / 2  # each set counts once
        np.testing.assert_allclose(table[name], expected, rtol=1e-5, atol=1e-7)
    rho = run.table("profile_correlations").set_index(["first", "second"]).loc[("mass", "meta_gradient_share"), "rho"]
    ranks = [frame[["mass", "meta_gradient_share"]].corr("spearman").iloc[0, 1] for frame in scores]
    assert rho == pytest.approx(sum(ranks) / 2, abs=1e-6)


def test_the_patch_of_a_run_is_fitted_on_the_held_out_rows(atlas: Path) -> None:
    run = SweepResult.load(atlas / "out").runs["tiny-synthetic-2-4-shots-lr-0.02"]
    table = run.table("patch").set_index("setting")
    accuracies = run.table("accuracies").set_index("quantity")["value"]
    assert table.loc["in context", "accuracy"] == pytest.approx(accuracies["accuracy ICL"])  # one-token label words
    assert table.loc["zero-shot", "accuracy"] == pytest.approx(accuracies["accuracy ZS"])
    assert table.loc["zero-shot", "gain"] == 0
    for seed in run.seeds:
        prompts = run.prompts(seed)
        assert len(prompts.held_out) == 6  # drawn for the patch, though the rate is given
        assert not {d.input for d in prompts.held_out} & {p.query for p in prompts.prompts}
        assert not {d.input for d in prompts.held_out} & {d.input for d in prompts.demos}
    assert "static patch, 6 queries" in table.index


def test_settings_that_came_later_change_no_older_run(reference: Path) -> None:
    run = SweepResult.load(reference).runs["tiny-synthetic-2-4-shots-lr-0.02"]
    stored = json.loads((run.path / "run.json").read_text())
    assert not {"profile", "patch", "further"} & set(stored["config"])
    assert dataclasses.replace(run.config, profile=True).fingerprint != run.config.fingerprint
    with pytest.raises(OptionError, match=r"was made without the head profile \(profile = false\)"):
        run.profile(0)
    with pytest.raises(OptionError, match=r"was made without the patch for all queries \(patch = false\)"):
        run.patch(0)


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
