"""Tasks: rows from files, labels, choice of demonstrations, and what is said when something is wrong."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from text_models import make_text_model, rows, write_rows

from metaopt_lens import MetaoptLensError
from metaopt_lens._errors import DataError, FileFormatError, OptionError
from metaopt_lens.experiments import RunConfig, run_experiment
from metaopt_lens.prompts import ICLPrompt, Template
from metaopt_lens.tasks import (
    BUILT_IN,
    HubSource,
    Row,
    Task,
    find_task,
    load_rows,
    load_task,
    register_task,
    select_demos,
    task_names,
)

PAIRS = [{"input": f"word{i}", "output": f"other{i}"} for i in range(10)]


def test_published_tasks_have_their_prompts() -> None:
    cb = find_task("cb")
    row = cb.row({"premise": "It rained. ", "hypothesis": "it was wet", "label": 2}, 0, "here")
    prompt = ICLPrompt((), row.input, cb.template)
    assert prompt.text == "It rained.\nQuestion: it was wet True, False, or Neither?\nAnswer:"
    assert row.label == "Neither"
    one_line = cb.one_line()
    flat = one_line.row({"premise": "It rained.", "hypothesis": "it was wet", "label": 2}, 0, "here")
    text = ICLPrompt((), flat.input, one_line.template).text
    assert text == "It rained. Question: it was wet True, False, or Neither? Answer:"


def test_published_templates() -> None:
    published = [task for task in BUILT_IN if task.hub is not None]
    assert {task.name for task in published} == {"sst2", "sst5", "mr", "subj", "agnews", "cb"}
    shown = {
        task.name: ICLPrompt([("x", (task.labels or ())[0])], "z", task.template, task.instruction).text
        for task in published
    }
    assert shown["sst2"] == "Sentence: x\nLabel: Negative\nSentence: z\nLabel:"
    assert shown["sst5"] == "Sentence: x\nLabel: terrible\nSentence: z\nLabel:"
    assert shown["mr"] == "Review: x\nSentiment: Negative\nReview: z\nSentiment:"
    assert shown["subj"] == "Input: x\nType: objective\nInput: z\nType:"
    assert shown["agnews"] == (
        "Classify the news articles into the categories of World, Sports, Business, and Technology.\n"
        "News: x\nType: World\nNews: z\nType:"
    )
    premise = "p\nQuestion: h"
    text = ICLPrompt([], premise, find_task("cb").template).text
    assert text == "p\nQuestion: h True, False, or Neither?\nAnswer:"


# SHA-256 (its beginning) of what version 0.1 stored of its tasks: its runs must go on.
_OF_0_1 = {
    "agnews": "cdbc774646786b21",
    "antonym": "2f49da71a734a0d4",
    "cb": "a8216a6e000d7569",
    "country-capital": "358ede1073ef3027",
    "country-currency": "5da93288c52509f0",
    "english-french": "f7431abbf523e7f3",
    "mr": "19669cae09d21b59",
    "present-past": "716b5b5ccdfe70cc",
    "singular-plural": "d93ae8c6b90157cd",
    "sst2": "c2693dadbf0eec19",
    "sst5": "a05ab4532732e35e",
    "subj": "f82eb8c444216486",
    "synonym": "717037faf92decdd",
    "synthetic": "5bf5e1e4b9549f91",
    "synthetic-2": "4f334dec5b7f5479",
    "synthetic-3": "68664ec5491ce82e",
    "word-pairs": "aebddc83be3d3dc5",
}


@pytest.mark.parametrize("name", _OF_0_1)
def test_tasks_are_those_of_0_1(name: str) -> None:
    body = json.dumps(find_task(name).to_dict(), sort_keys=True)
    assert hashlib.sha256(body.encode()).hexdigest()[:16] == _OF_0_1[name]


def test_a_new_task_is_one_row(tmp_path: Path) -> None:
    """By its name in Python and as a file on the command line, from rows of a table to tables of results."""
    row = Task("review", Template("Said: {input}\nSo:"), labels=("Negative", "Positive"))
    assert register_task(row) is find_task("review")
    data = write_rows(tmp_path / "review.jsonl")
    settings: dict[str, Any] = {"shots": 4, "seeds": (0,), "queries": 4, "lr": 0.02, "rules": ("gd",)}
    settings |= {"n_null_draws": 2, "random_weights": False, "attribution": False}
    config = RunConfig("random", "review", data=str(data), **settings)
    run = run_experiment(config, tmp_path / "run", model=make_text_model(), progress=False)
    assert set(run.table("predictions")["label"]) <= {"Negative", "Positive"}
    (prompt, *_) = run.prompts(0).prompts
    assert prompt.text.endswith(f"Said: {prompt.query}\nSo:")
    assert prompt.candidates == ("Negative", "Positive")
    assert len(prompt.demos) == 4
    (tmp_path / "review.toml").write_text(
        'labels = ["Negative", "Positive"]\n[template]\ninput = "Said: {input}\\nSo:"\n', encoding="utf-8"
    )
    same = dataclasses.replace(config, task=str(tmp_path / "review.toml"))
    again = run_experiment(same, tmp_path / "again", model=make_text_model(), progress=False)
    assert again.prompts(0) == run.prompts(0)


@pytest.mark.parametrize("label", [1, "1", "1.0", "Positive", "positive"])
def test_a_label_is_a_number_a_word_or_a_class_name(label: Any) -> None:
    assert find_task("sst2").row({"sentence": "fine", "label": label}, 0, "here").label == "Positive"


def test_braces_in_the_data_stay() -> None:
    assert find_task("sst2").row({"text": "a {text} {x}", "label": 0}, 0, "here").input == "a {text} {x}"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    records = rows()
    file = tmp_path / f"sst2{suffix}"
    if suffix == ".jsonl":
        write_rows(file)
    elif suffix == ".json":
        file.write_text(json.dumps(records))
    elif suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(records).to_parquet(file)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(records[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    reference = load_rows(find_task("sst2"), write_rows(tmp_path / "reference.jsonl"))
    for place in (file, *([tmp_path] if suffix == ".jsonl" else [])):
        found = load_rows(find_task("sst2"), place)
        assert (found.train, found.validation, found.fingerprint) == (
            reference.train,
            reference.validation,
            reference.fingerprint,
        )
    assert len(reference.train) == 40
    assert len(reference.validation) == 20
    assert reference.train[0].input == "a warm and clever film in every scene"


def test_a_folder_with_one_file_per_split(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [r for r in rows() if r["split"] == name])
    found = load_rows(find_task("sst2"), tmp_path)
    assert (len(found.train), len(found.validation)) == (40, 20)


def test_word_pairs_are_divided_always_in_the_same_way(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    found = load_rows(find_task("antonym"), file)
    again = load_rows(find_task("word-pairs"), file)
    assert found.fingerprint == again.fingerprint
    assert sorted(row.input for row in (*found.train, *found.validation)) == sorted(p["input"] for p in PAIRS)
    assert not {row.input for row in found.train} & {row.input for row in found.validation}


def test_own_task_in_python_and_toml(tmp_path: Path) -> None:
    task = Task("weather", Template(input="Report: {input}\nSky:"), labels=("dry", "wet"), input="{report}")
    register_task(task)
    assert find_task("weather") is task
    assert "weather" in task_names()
    with pytest.raises(OptionError, match=r"there is already a task 'weather'.*replace=True"):
        register_task(Task("weather", labels=("sun", "rain")))
    file = tmp_path / "weather.toml"
    file.write_text('labels = ["dry", "wet"]\ninput = "{report}"\n[template]\ninput = "Report: {input}\\nSky:"\n')
    assert load_task(file) == task
    assert find_task(str(file)) == task
    hub = Task("x", hub=HubSource("me/x", validation="test"), labels=("a", "b"))
    assert Task.from_dict(hub.to_dict()) == hub


def _choose(selection: str, n: int, **options: Any) -> tuple[Row, ...]:
    records = [find_task("sst2").row(r, i, "") for i, r in enumerate(rows())]
    return select_demos(records, n, seed=options.pop("seed", 0), selection=selection, **options)


def test_balanced_choice() -> None:
    found = _choose("balanced", 9)
    assert sorted(Counter(row.label for row in found).values()) == [4, 5]
    assert found == _choose("balanced", 9)
    assert found != _choose("balanced", 9, seed=1)
    assert len({row.index for row in found}) == 9


def test_permutation_changes_the_order_only() -> None:
    first, second = _choose("random", 8), _choose("random", 8, permutation=3)
    assert first != second
    assert set(first) == set(second)


def test_nearest_neighbours() -> None:
    found = _choose("nearest", 6, queries=["the songs were lovely"])
    assert found[-1].input.startswith("the songs are lovely")  # the nearest stands next to the query
    assert all("songs" in row.input for row in found)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda _: find_task("sts2"), OptionError, "there is no task 'sts2': known are .*sst2.*TOML file"),
        (lambda d: load_rows(find_task("sst2"), d / "no.jsonl"), DataError, "no file or folder .*no.jsonl.*'sst2'"),
        (lambda d: load_rows(find_task("sst2"), d), DataError, "holds neither sst2.jsonl nor train.jsonl"),
        (lambda _: load_rows(find_task("antonym")), DataError, "not on the hub: give a local file.*input, output"),
        (lambda _: _choose("balanced", 99), DataError, "99 demonstrations are asked for but there are only 60 rows"),
        (lambda _: _choose("odd", 9), OptionError, "selection must be one of random, balanced, nearest, got 'odd'"),
        (lambda _: _choose("nearest", 9), OptionError, "needs the queries"),
        (lambda _: Task("x", labels=("a",)), OptionError, r"at least two different label words, got \['a'\]"),
        (lambda _: Task("x", labels=("a", "b"), label_names=("1",)), OptionError, "2 label words but 1 label names"),
        (lambda _: Task("x", input="text"), OptionError, "names no column: write it as in '{text}'"),
    ],
)
def test_wrong_requests(tmp_path: Path, act: Any, error: type[MetaoptLensError], message: str) -> None:
    with pytest.raises(error, match=message):
        act(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"label": 1}', "data.jsonl, row 1 has no column 'text', which task 'sst2' needs; its columns are 'label'"),
        ('{"text": "x"}', "row 1 has no column 'label'"),
        ('{"text": null, "label": 1}', "row 1: column 'text', which task 'sst2' needs, is empty"),
        ('{"text": "  ", "label": 1}', "row 1: the input of task 'sst2' is empty"),
        (
            '{"text": "x", "label": 2}',
            r"row 1: the label 2 is outside the label words of task 'sst2' \(0 Negative, 1 Positive\)",
        ),
        ('{"text": "x", "label": -1}', "the label -1 is outside"),
        ('{"text": "x", "label": "meh"}', "the label 'meh' is outside"),
        ('{"text": "x", "label": 1, "split": "best"}', "row 1: the split 'best' is neither 'train' nor one of"),
        ('{"text": ', "data.jsonl, line 1: not valid JSON"),
        ("[1]", "line 1: a row must be a JSON object"),
        ("", "data.jsonl holds no rows"),
    ],
)
def test_wrong_rows(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises((DataError, FileFormatError), match=message):
        load_rows(find_task("sst2"), file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a", r"is none of .jsonl, .json, .csv, .tsv, .parquet"),
        ("x.jsonl", b"\xff\xfe", "is not UTF-8 text"),
        ("x.csv", b"text,label\na,1,2\n", "line 2: not as many fields as the header names"),
        ("x.parquet", b"nothing", "is not a readable parquet file"),
        ("x.json", b"{}", "must be a JSON list of objects"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        load_rows(find_task("sst2"), tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("labels = [", "is not valid TOML"),
        ("words = 1", "mine.toml has no field 'words'; its fields are name, template"),
        ('label = ["a", "b"]', "mine.toml has no field 'label'; .*Did you mean 'labels'"),
        ('labels = "ab"', "mine.toml: labels must be a list of words, got 'ab'"),
        ("instruction = 3", "mine.toml: instruction must be a string, got 3"),
        ('[hub]\nconfig = "x"', r"mine.toml, \[hub\] does not say which path"),
        (
            '[hub]\npath = "x"\nsplit = "y"',
            r"mine.toml, \[hub\] has no field 'split'; its fields are path, config, train",
        ),
        ('labels = ["a", "a"]', "at least two different label words"),
        ('[template]\ninput = "x"', "has no {input}"),
    ],
)
def test_wrong_task_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content)
    with pytest.raises(FileFormatError, match=message):
        load_task(file)
    with pytest.raises(FileFormatError, match=r"task file .*no.toml cannot be read"):
        load_task(tmp_path / "no.toml")


def test_a_few_rows_of_a_label_are_too_few_for_balance() -> None:
    few = [Row("a", "x", 0), Row("b", "x", 1), Row("c", "x", 2), Row("d", "y", 3)]
    with pytest.raises(DataError, match="needs 2 rows labelled 'y', but there are 1"):
        select_demos(few, 4, seed=0)


def test_the_hub_out_of_reach_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # the library's own switch
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = "'sst2' .stanfordnlp/sst2. could not be loaded from the Hugging Face hub .*--data.*fields text, label"
    with pytest.raises(DataError, match=message):
        load_rows(find_task("sst2"))
