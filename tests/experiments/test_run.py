"""run_experiment: what is stored, resuming, killing, sharing a directory, damage, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from families import make_bridge
from runs import SMALL, files_of, fork, wait
from text_models import make_text_model, rows, write_rows

import metaopt_lens
from metaopt_lens import MetaoptLensError, load_tiny
from metaopt_lens._errors import (
    ContextWindowError,
    DataError,
    FileFormatError,
    OptionError,
    OutputError,
    PromptError,
)
from metaopt_lens.experiments import ExperimentResult, RunConfig, run_experiment
from metaopt_lens.experiments._prompt_set import PromptSet
from metaopt_lens.experiments._run_store import RunStore
from metaopt_lens.experiments._stages import _controls
from metaopt_lens.tasks import Row, Task, TaskRows

_KILLS = 20


def _run(config: RunConfig, out: Path, model: Any, **options: Any) -> ExperimentResult:
    return run_experiment(config, out, model=model, progress=False, **options)


def _with(**changes: Any) -> RunConfig:
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture(scope="module")
def tiny() -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return load_tiny()


@pytest.fixture(scope="module")
def reference(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and how long it took (the first run, which warms everything up, apart)."""
    _run(SMALL, tmp_path_factory.mktemp("warm"), tiny)
    out = tmp_path_factory.mktemp("reference")
    started = time.monotonic()
    _run(SMALL, out, tiny)
    return out, time.monotonic() - started


# ---- what is stored -----------------------------------------------------------------------------------------------


def test_everything_is_stored(reference: tuple[Path, float], tiny: Any) -> None:
    result = ExperimentResult.load(reference[0])
    assert result.is_complete
    assert result.config == SMALL
    assert result.notes == ()
    heads = result.table("heads")
    assert set(heads["rule"]) == {"gd"}
    one = heads[(heads["rule"] == "gd") & (heads["statistic"] == "z total")]
    assert len(one) == 12
    assert {
        "null: other query",
        "null: shuffled labels",
        "null: flipped labels",
        "null: unrelated text",
        "low",
        "high",
    } <= set(one.columns)
    accuracies = result.table("accuracies")
    assert {"accuracy ZS", "accuracy ICL", "accuracy FT", "Rec2FTP %"} <= set(accuracies["quantity"])
    predictions = result.table("predictions")
    right = predictions[predictions["rule"] == "gd"]
    value = accuracies[(accuracies["rule"] == "gd") & (accuracies["quantity"] == "accuracy ICL")]["value"].item()
    assert (right["icl"] == right["label"]).mean() == pytest.approx(value)
    joined = result.comparison("gd")
    assert joined.n_demos == (4, 4)
    assert len(joined.sets) == 6
    assert [s["layer_causal"] for s in joined.settings["finetuning"]] == [False, False]
    assert len(result.table("attributions")) == 12
    assert result.attribution(0) is not None
    assert result.model["n_layers"] == 3
    assert set(result.data["fingerprint"]) == {"0", "1"}
    prompts = result.prompts(1)
    assert len(prompts.demos) == 4
    assert not {d.input for d in prompts.demos} & {p.query for p in prompts.prompts}
    (log,) = result.provenance
    assert log["ended"]
    assert log["config"]["task"] == "synthetic-2"
    assert {"torch", "transformer-lens", "metaopt-lens"} <= set(log["versions"])
    assert len(log["pieces"]) == len(list(reference[0].rglob("piece.json")))
    assert "complete" in repr(result)


def test_runs_of_version_0_1_are_refused(reference: tuple[Path, float], tiny: Any, tmp_path: Path) -> None:
    old = Path(shutil.copytree(reference[0], tmp_path / "old"))
    body = json.loads((old / "run.json").read_text())
    del body["format"]
    (old / "run.json").write_text(json.dumps(body))
    for attempt in (lambda: ExperimentResult.load(old), lambda: _run(SMALL, old, tiny)):
        with pytest.raises(FileFormatError, match=r"holds a run of metaopt-lens 0\.1.*run it again in a new directory"):
            attempt()


def test_a_finished_run_is_left_as_it_is(reference: tuple[Path, float]) -> None:
    before = {file: file.stat().st_mtime_ns for file in reference[0].rglob("*")}
    _run(SMALL, reference[0], model=None)  # the model is not even loaded
    assert {file: file.stat().st_mtime_ns for file in reference[0].rglob("*")} == before


def test_the_log_gets_a_line_for_each_piece_with_the_time_left(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _with(seeds=(0,), attribution=False)
    with caplog.at_level("INFO", "metaopt_lens"):
        result = metaopt_lens.run_experiment(config, tmp_path / "run", model=tiny)
        lines = [record.message for record in caplog.records if record.message.startswith("tiny on synthetic-2: ")]
        pieces = [name for log in result.provenance for name in log["pieces"]]
        assert len(pieces) == 4
        for line, name in zip(lines[:-1], pieces, strict=True):
            assert re.fullmatch(rf"tiny on synthetic-2: {name}, \d+ %, about \d+ s left", line), line
        caplog.clear()
        _run(config, tmp_path / "silent", tiny)
        assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1, True, True, False)),
        ({"controls": "sceptic"}, (4, True, True, True)),
        ({"controls": "quick"}, (0, False, False, False)),
        ({"controls": "standard"}, (1, True, True, False)),
        ({"controls": "standard", "n_label_draws": 3, "unrelated": False}, (3, True, False, False)),
        ({"controls": "quick", "random_weights": True}, (0, False, False, True)),
    ],
)
def test_controls_are_those_of_a_preset_but_for_what_is_said(changes: dict[str, Any], expected: Any) -> None:
    prompts = PromptSet((), (), ("w1 w2",), {}, ())
    asked = _controls(RunConfig("tiny", "synthetic", n_null_draws=7, **changes), prompts)
    assert (asked.shuffled_labels, asked.flipped_labels, asked.unrelated_text, asked.random_weights) == expected
    assert asked.texts == ({"unrelated text": ("w1 w2",)} if asked.unrelated_text else {})
    assert asked.n_null_draws == 7


def test_a_table_of_settings_will_do_and_shuffles_are_as_many_as_asked_for(tiny: Any, tmp_path: Path) -> None:
    settings = SMALL.to_dict() | {"seeds": 1, "n_label_draws": 2, "attribution": False}
    result = metaopt_lens.run_experiment(settings, tmp_path / "run", model=tiny, progress=False)
    assert result.config == _with(seeds=(0,), n_label_draws=2, attribution=False)
    found = result.comparison(result.config.rules[0])
    assert found.settings["n_label_draws"] == 2
    assert {len(rows) for rows in found.controlled.values()} == {2, 1}  # shuffles, and one flip
    with pytest.raises(OptionError, match="shots"):
        metaopt_lens.run_experiment({**settings, "shots": 0}, tmp_path / "other")


def test_the_learning_rate_is_chosen_and_updates_are_stored(tiny: Any, tmp_path: Path) -> None:
    config = _with(lr="auto", seeds=(0,), rules=("lcgd",), save_updates=True, attribution=False, held_out=3)
    result = _run(config, tmp_path / "run", tiny)
    choice = result.learning_rate("lcgd", 0)
    assert choice is not None
    assert result.finetuning("lcgd", 0)["lr"] == choice.lr
    table = result.table("learning_rates")
    assert table[table["chosen"]]["lr"].item() == choice.lr
    update = result.update("lcgd", 0)
    assert update.settings is not None
    assert update.settings.layer_causal
    assert update.settings.lr == choice.lr
    assert len(result.table("losses")) == 4
    with pytest.raises(OptionError, match="made without the attribution to heads"):
        result.attribution(0)
    with pytest.raises(OptionError, match="has the rules lcgd, not 'gd'"):
        result.comparison("gd")
    with pytest.raises(OptionError, match=r"has the seeds \[0\], not 5"):
        result.prompts(5)
    with pytest.raises(OptionError, match="there is no table 'tables'; this run has accuracies, findings, heads"):
        result.table("tables")


def test_rows_of_your_own_on_a_gpt2_shaped_model(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "sst2.jsonl")
    config = _with(model="random", task="sst2", data=str(data), shots=32, queries=None, random_weights=True)
    result = _run(config, tmp_path / "run", make_text_model())
    prompts = result.prompts(0)
    assert len(prompts.prompts) == 20
    assert prompts.prompts[0].candidates == ("Negative", "Positive")
    assert 4 <= len(prompts.demos) < 32
    assert any("32 demonstrations fit the context window of 256 tokens" in note for note in result.notes)
    assert result.prompts(0).prompts[0].query == result.prompts(1).prompts[0].query
    assert result.data["source"] == "local file sst2.jsonl"
    assert str(tmp_path) not in json.dumps(result.data) + (tmp_path / "run" / "run.json").read_text()
    summary = result.table("summary")
    assert "null: random weights" in summary.columns
    assert summary["value"].notna().any()


def test_word_pairs_choose_among_outputs(tmp_path: Path) -> None:
    words = ("film", "story", "songs", "evening", "scene", "sister", "whole", "again", "start", "end", "well", "i")
    data = write_rows(
        tmp_path / "p.jsonl", [{"input": w, "output": v} for w, v in zip(words, words[::-1], strict=True)]
    )
    config = _with(
        model="random", task="antonym", data=str(data), shots=3, queries=4, n_candidates=3, lr="auto", seeds=(2,)
    )
    result = _run(config, tmp_path / "run", make_text_model())
    prompts = result.prompts(2)
    assert all(len(p.candidates or ()) == 3 and p.label in (p.candidates or ()) for p in prompts.prompts)
    assert result.table("predictions")["icl"].isin(words).all()


# ---- killed, shared, damaged --------------------------------------------------------------------------------------


def test_killed_at_random_moments_and_resumed(reference: tuple[Path, float], tiny: Any, tmp_path: Path) -> None:
    whole, duration = reference
    rng = random.Random(5)
    out, kills, runs = tmp_path / "run-0", 0, 0
    while kills < _KILLS:
        child = fork(lambda: _run(SMALL, out, tiny))  # noqa: B023 (the child runs at once)
        time.sleep(rng.uniform(0.0, 0.35 * duration))
        os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL:
            kills += 1
        if ExperimentResult(out, SMALL, Task("x")).is_complete:
            assert files_of(out) == files_of(whole)
            runs += 1
            out = tmp_path / f"run-{runs}"
    _run(SMALL, out, tiny)
    assert files_of(out) == files_of(whole)
    assert not _left_behind(out)


def _left_behind(folder: Path) -> list[Path]:
    """Lock files and drafts."""
    return [file for file in folder.rglob("*") if file.name.startswith((".lock", ".draft"))]


def test_nothing_is_left_behind(tiny: Any, tmp_path: Path) -> None:
    """Neither by a run that finishes, nor by a killed one once another has come; what others work on is not touched."""
    out = tmp_path / "run"
    config = _with(seeds=(0,), attribution=False)
    store = RunStore(out)

    def die_in_the_middle() -> None:
        with store.lock("seed-0/gd"):
            store.write("seed-0/gd", lambda folder: os.kill(os.getpid(), signal.SIGKILL))

    store.prepare()
    assert wait(fork(die_in_the_middle)) == -signal.SIGKILL
    assert [file.name.split(".")[1] for file in sorted(_left_behind(out))] == ["draft", "lock"]
    ready, done = os.pipe()

    def work_for_long() -> None:
        with store.lock("seed-0/prompts") as mine:
            assert mine
            os.write(done, b"x")
            time.sleep(60)

    other = fork(work_for_long)
    os.read(ready, 1)
    store.prepare()
    assert [file.name for file in _left_behind(out)] == [".lock.seed-0.prompts"]
    with store.lock("seed-0/prompts") as mine:
        assert not mine
    os.kill(other, signal.SIGKILL)
    assert wait(other) == -signal.SIGKILL
    assert _run(config, out, tiny).is_complete
    assert not [file for file in out.rglob("*") if file.name.startswith(".")]


def test_two_processes_on_one_directory(reference: tuple[Path, float], tiny: Any, tmp_path: Path) -> None:
    children = [fork(lambda: _run(SMALL, tmp_path / "run", tiny)) for _ in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    assert files_of(tmp_path / "run") == files_of(reference[0])
    logs = ExperimentResult.load(tmp_path / "run").provenance
    made = [piece for log in logs for piece in log["pieces"]]
    assert sorted(made) == sorted(set(made))  # nothing was done twice
    assert len(made) == len(list(reference[0].rglob("piece.json")))


def test_seeds_on_their_own_make_the_same_run(reference: tuple[Path, float], tiny: Any, tmp_path: Path) -> None:
    first = _run(SMALL, tmp_path / "run", tiny, only_seeds=[1])
    assert not first.is_complete
    with pytest.raises(OptionError, match="is not finished: run it again to resume it"):
        first.table("heads")
    with pytest.raises(FileFormatError, match=r"has no piece seed-0/gd \(yet\)"):
        first.comparison("gd")
    assert _run(SMALL, tmp_path / "run", tiny, only_seeds=[0]).is_complete
    assert files_of(tmp_path / "run") == files_of(reference[0])
    with pytest.raises(OptionError, match=r"has the seeds \[0, 1\], not 7"):
        _run(SMALL, tmp_path / "run", tiny, only_seeds=[7])


@pytest.mark.parametrize(
    ("piece", "name", "problem"),
    [
        ("seed-0/gd", "comparison.safetensors", "comparison.safetensors has changed"),
        ("seed-1/prompts", "prompts.json", "prompts.json is missing"),
        ("tables", "piece.json", "piece.json is missing or unreadable"),
    ],
)
def test_a_damaged_piece_is_named_and_recomputed_only_when_asked(
    reference: tuple[Path, float], tiny: Any, tmp_path: Path, piece: str, name: str, problem: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference[0], out)
    file = out / "pieces" / piece / name
    if problem.endswith("missing"):
        file.unlink()
    else:
        body = bytearray(file.read_bytes())
        body[len(body) // 2] ^= 255
        file.write_bytes(body)
    with pytest.raises(FileFormatError, match=f"pieces/{piece} is damaged: {problem}.*--recompute-damaged"):
        _run(SMALL, out, tiny)
    assert _run(SMALL, out, tiny, recompute_damaged=True).is_complete
    assert files_of(out) == files_of(reference[0])


def test_a_full_disk_keeps_what_is_finished(reference: tuple[Path, float], tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
        with pytest.raises(OutputError, match=r"run cannot be written \(.*File too large.*Finished pieces are kept"):
            _run(SMALL, out, tiny)

    assert wait(fork(limited)) == 0
    assert (out / "pieces" / "seed-0" / "prompts").is_dir()
    assert not (out / "pieces" / "seed-0" / "gd").exists()
    _run(SMALL, out, tiny)
    assert files_of(out) == files_of(reference[0])


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_the_directory_of_another_run_is_refused(reference: tuple[Path, float], tiny: Any, tmp_path: Path) -> None:
    out = reference[0]
    for changes, message in (
        ({"shots": 5}, "another configuration: config.shots is 4 there and 5 here"),
        ({"seeds": (0, 1, 2)}, r"config.seeds is \[0, 1\] there and \[0, 1, 2\] here"),
        ({"task": "synthetic"}, 'config.task is "synthetic-2" there and "synthetic" here'),
    ):
        with pytest.raises(OutputError, match=message):
            _run(_with(**changes), out, tiny)
    with pytest.raises(OutputError, match=r"another configuration: task.template.input is"):
        _run(SMALL, out, tiny, task=dataclasses.replace(_own_task(), name="synthetic-2"))
    _run(_with(device="cpu", data=None), out, tiny)  # where it runs does not matter
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(OutputError, match=r"full is not empty and holds no run \(letter.txt is there\)"):
        _run(SMALL, tmp_path / "full", tiny)
    with pytest.raises(OutputError, match=r"letter.txt/run cannot be written \(Not a directory\)"):
        _run(SMALL, tmp_path / "full" / "letter.txt" / "run", tiny)


def test_other_data_or_another_model_are_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "sst2.jsonl")
    config = _with(model="random", task="sst2", data=str(data), attribution=False)
    _run(config, tmp_path / "run", make_text_model(), only_seeds=[0])
    with pytest.raises(OutputError, match="another model: n_layers is 2 there and 3 here"):
        _run(config, tmp_path / "run", make_text_model(n_layers=3))
    write_rows(data, rows()[1:])
    with pytest.raises(OutputError, match="another data set: fingerprint is"):
        _run(config, tmp_path / "run", make_text_model())


def test_no_trace_of_a_run_that_could_not_start(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match=r"4.*"):
        _run(_with(shots=40), out, tiny)
    _run(_with(seeds=(0,), attribution=False), out, tiny)  # not "another configuration"


def _own_task(labels: tuple[str, ...] | None = ("dax", "wug"), n: int = 12) -> Task:
    def make(_: int) -> TaskRows:
        some = tuple(Row("apple", (labels or ("dax",))[i % len(labels or "1")], i) for i in range(n))
        return TaskRows(some, some, "a function")

    from metaopt_lens.prompts import Template

    return Task("mine", Template(input="{input} ->"), labels=labels, make_rows=make)


@pytest.mark.parametrize(
    ("changes", "task", "error", "message"),
    [
        ({"task": "sst9"}, None, OptionError, "there is no task 'sst9'"),
        (
            {"shots": 40},
            None,
            DataError,
            "40 demonstrations are needed, but 2 categories of nouns.* has only 12 rows to learn task 'synthetic-2'",
        ),
        (
            {"shots": 12, "lr": "auto"},
            None,
            DataError,
            "12 demonstrations and at least 1 row held out to choose the learning rate .or give lr. are needed",
        ),
        ({"data": "x.jsonl"}, None, DataError, "'synthetic-2' makes its own rows: leave out the data x.jsonl"),
        ({}, _own_task(n=3), DataError, "4 demonstrations are needed, but a function has only 3 rows"),
        ({"shots": 1}, _own_task(n=1), DataError, "at least 2 query rows are needed, but a function has 1"),
        ({}, _own_task(("dax", "Dax")), PromptError, "unknown|<unk>|no token"),
        ({}, _own_task(("dax", "dax ")), PromptError, "'dax' and 'dax ' have the same token ids"),
    ],
)
def test_bad_input_before_any_run(
    tiny: Any, tmp_path: Path, changes: Any, task: Task | None, error: type[MetaoptLensError], message: str
) -> None:
    with pytest.raises(error, match=message):
        _run(_with(**changes), tmp_path / "run", tiny, task=task)
    assert not (tmp_path / "run" / "pieces").exists()


def test_label_words_that_share_a_first_token(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl")
    task = Task("mine", labels=("the songs", "the film"))
    config = _with(model="random", task="mine", data=str(data), scoring="first")
    with pytest.raises(PromptError, match="share their first token; score whole labels with scoring='mean'"):
        _run(config, tmp_path / "run", make_text_model(), task=task)


def test_windows_that_are_too_small(tmp_path: Path) -> None:
    config = _with(model="random", task="sst2", data=str(write_rows(tmp_path / "d.jsonl")))
    with pytest.raises(ContextWindowError, match="not even one demonstration of task 'sst2' fits"):
        _run(config, tmp_path / "run", make_text_model(n_ctx=24))
    with pytest.raises(ContextWindowError, match=r"query .* of task 'sst2' has .* tokens"):
        _run(config, tmp_path / "run", make_text_model(n_ctx=12))


def test_label_words_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    config = _with(model="random", task="sst2", data=str(write_rows(tmp_path / "d.jsonl")))
    with pytest.raises(PromptError, match="'Negative' and 'Positive' have the same token ids"):
        _run(config, tmp_path / "run", make_bridge("gpt2"))


# ---- configuration ------------------------------------------------------------------------------------------------


def test_configurations_go_to_toml_and_json_and_back(tmp_path: Path) -> None:
    config = _with(lr="auto", model="some/model é", prepend_bos=False, data="x.jsonl")
    (tmp_path / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    assert RunConfig.load(tmp_path / "run.toml") == config
    assert RunConfig.load(tmp_path / "run.json") == config
    assert RunConfig.from_dict({"model": "m", "task": "t", "seeds": 2}).seeds == (0, 1)
    assert config.fingerprint == dataclasses.replace(config, data="y.jsonl", device="cuda").fingerprint
    assert config.fingerprint != dataclasses.replace(config, shots=5).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots must be a whole number of at least 1, got 0"),
        ({"queries": 1}, "queries must be a whole number of at least 2, got 1"),
        ({"lr": -1.0}, "lr must be 'auto' or a positive, finite number, got -1.0"),
        ({"lr": float("nan")}, "got nan"),
        ({"seeds": ()}, "seeds must be one or several different numbers"),
        ({"seeds": (1, 1)}, r"got \[1, 1\]"),
        ({"rules": ("sgd",)}, r"rules must be 'gd', 'lcgd' or both, got \['sgd'\]"),
        ({"variant": "old"}, "variant must be one of published, one-line, got 'old'"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"shot": 3}, "has no field 'shot'; its fields are model, task, shots, .* Did you mean 'shots'"),
        ({"shots": True}, "shots must be a whole number of at least 1, got True"),
        ({"shots": "4"}, "shots must be a whole number of at least 1, got '4'"),
        ({"reference": "no"}, "reference must be true or false, got 'no'"),
        ({"model": 3}, "the configuration: model must be a string, got 3"),
        ({"rules": ()}, r"rules must be 'gd', 'lcgd' or both, got \[\]"),
        ({"shots": 0, "queries": 1}, "shots must be .*, got 0. queries must be .*, got 1"),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RunConfig.from_dict(
            {**SMALL.to_dict(), **{k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}}
        )


def test_configurations_are_checked_in_python_as_in_files() -> None:
    with pytest.raises(OptionError, match=r"^shots must be a whole number of at least 1, got 0.$"):
        _with(shots=0)
    with pytest.raises(OptionError, match=r"^model must be a string, got 3. task must be a string, got 4.$"):
        RunConfig(3, 4)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^RunConfig does not say which model and task.$"):
        RunConfig()  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.shots = 5  # type: ignore[misc]


def test_configurations_of_0_1_are_read() -> None:
    """What 0.1 stored is kept, and fields that it did not have take their defaults; a whole number stays one.

    Run folders of 0.1 are refused as a whole, so their fingerprints need not be found again.
    """
    stored = """{"model": "tiny", "task": "mr", "shots": 4, "seeds": [0, 1, 2], "queries": null, "lr": 1, "variant":
        "published", "selection": "balanced", "permutation": 0, "rules": ["gd", "lcgd"], "epochs": 1, "held_out": 32,
        "n_candidates": null, "scoring": "mean", "random_weights": true, "unrelated": true, "attribution": true,
        "attribution_queries": 16, "attribution_metric": "auto", "n_null_draws": 20, "subspace_dim": 4, "reference":
        false, "prepend_bos": null, "dtype": "float32", "revision": null, "batch_size": 16, "save_updates": false,
        "allow_processed": false, "data": null, "device": null, "n_devices": null, "device_map": null, "threads": null}
        """
    config = RunConfig.from_dict(json.loads(stored))
    newer = {"controls": "standard", "n_label_draws": None, "labels": "natural"}
    newer |= {"further": None, "patch": False, "profile": False}
    assert config.to_dict() == json.loads(stored) | newer
    assert isinstance(config.lr, int)
    assert RunConfig.from_dict(config.to_dict()).fingerprint == config.fingerprint


def test_unreadable_configurations_and_directories(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("model = ")
    with pytest.raises(FileFormatError, match=r"x.toml is not valid TOML"):
        RunConfig.load(tmp_path / "x.toml")
    with pytest.raises(FileFormatError, match=r"y.toml cannot be read"):
        RunConfig.load(tmp_path / "y.toml")
    with pytest.raises(OptionError, match="does not say which model and task"):
        RunConfig.from_dict({})
    with pytest.raises(FileFormatError, match=r"holds no run: there is no run.json"):
        ExperimentResult.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"run.json is damaged"):
        ExperimentResult.load(tmp_path)


def test_tables_are_plain_parquet(reference: tuple[Path, float]) -> None:
    for file in (reference[0] / "pieces" / "tables").glob("*.parquet"):
        assert len(pd.read_parquet(file))
