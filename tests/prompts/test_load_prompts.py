"""Prompt files: what is read, and the file and line in what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaopt_lens._errors import FileFormatError
from metaopt_lens.prompts import ICLPrompt, Template, load_prompts

_OBJECT = {"demos": [{"input": "apple", "label": "dax"}, ["hammer", "wug"]], "query": "pear"}
_PROMPT = ICLPrompt([("apple", "dax"), ("hammer", "wug")], "pear")


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_bytes(text.encode())
    return path


def test_json_object_list_and_lines(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "a.json", _OBJECT)) == [_PROMPT]
    assert load_prompts(str(write(tmp_path, "b.JSON", [_OBJECT, _OBJECT]))) == [_PROMPT] * 2
    line = json.dumps(_OBJECT)
    assert load_prompts(write(tmp_path, "c.jsonl", f"\ufeff{line}\r\n\r\n{line}")) == [_PROMPT] * 2


def test_json_optional_fields(tmp_path: Path) -> None:
    full = _OBJECT | {
        "label": "dax",
        "candidates": ["dax", "wug"],
        "instruction": "é Sort.",
        "template": {
            "input": "In: {input}",
            "label": "={label}",
            "separator": ";",
            "instruction_separator": None,
        },
    }
    template = Template("In: {input}", "={label}", ";")
    expected = ICLPrompt(_PROMPT.demos, "pear", template, "é Sort.", label="dax", candidates=["dax", "wug"])
    assert load_prompts(write(tmp_path, "a.json", full)) == [expected]
    assert load_prompts(write(tmp_path, "b.json", {"query": "pear", "template": None})) == [ICLPrompt([], "pear")]


def test_json_many_queries_behind_the_same_demos(tmp_path: Path) -> None:
    many = {"demos": _OBJECT["demos"], "queries": ["pear", "saw"], "labels": ["dax", "wug"]}
    first, second = load_prompts(write(tmp_path, "a.json", many))
    assert first == ICLPrompt(_PROMPT.demos, "pear", label="dax")
    assert second == ICLPrompt(_PROMPT.demos, "saw", label="wug")
    del many["labels"]
    assert [prompt.label for prompt in load_prompts(write(tmp_path, "b.json", many))] == [None, None]


def test_text_in_json_and_text_files(tmp_path: Path) -> None:
    text = "apple : dax\nhammer : wug\npear :"
    prompt = ICLPrompt.from_string(text)
    item = {"text": text, "label": "dax"}
    assert load_prompts(write(tmp_path, "a.json", item)) == [ICLPrompt.from_string(text, label="dax")]
    assert load_prompts(write(tmp_path, "a.txt", text + "\n")) == [prompt]
    two = f"---\n{text}\n--- \n\n{text}\n---\n".replace("\n", "\r\n")
    assert load_prompts(write(tmp_path, "b", two)) == [prompt] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt holds no prompt: it is empty"),
        ("a.json", " \n", r"a\.json holds no prompt"),
        ("a.json", [], r"a\.json holds no prompt"),
        ("a.json", '{"query":\n oops}', r"a\.json, line 2: not valid JSON \(Expecting value, column 2\)"),
        ("a.jsonl", '{"query": "a"}\n{"query"', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"query": "a"}\n\n{"query": ""}', r"a\.jsonl, line 3: the query is empty"),
        ("a.json", [{"query": "a"}, 3], r"a\.json, item 2: a prompt is a JSON object, got a number"),
        ("a.json", "null", r"a\.json: a prompt is a JSON object, got null"),
        ("a.json", [["a"]], r"item 1: a prompt is a JSON object, got a list"),
        ("a.json", {"querry": "a"}, r"a prompt has no field 'querry': its fields are demos, query, queries"),
        ("a.json", {"demos": []}, r'needs either "query" or "queries"'),
        ("a.json", {"query": "a", "queries": ["b"]}, r'needs either "query" or "queries"'),
        (
            "a.json",
            {"queries": ["b"], "label": "c"},
            r'"label" goes with "query" and "labels" with "queries"',
        ),
        ("a.json", {"query": "b", "labels": ["c"]}, r'"label" goes with "query"'),
        ("a.json", {"queries": ["b"], "labels": []}, r'"labels" needs one label for each query, got 0 for 1'),
        ("a.json", {"queries": []}, r'"queries" is an empty list'),
        ("a.json", {"queries": "b"}, r'"queries" must be a list of strings, got a string'),
        ("a.json", {"queries": ["b", 1]}, r'"queries" must be a list of strings, got a list that is not of'),
        ("a.json", {"query": 1}, r'"query" must be a string, got a number'),
        ("a.json", {"query": "a", "candidates": None}, r'"candidates" must be a list of strings, got null'),
        ("a.json", {"query": "a", "instruction": True}, r'"instruction" must be a string, got true or false'),
        ("a.json", {"query": "a", "demos": {}}, r'"demos" must be a list, got an object'),
        ("a.json", {"query": "a", "demos": [["a", "b"], ["é"]]}, r'demonstration 1 must be .* got \["é"\]'),
        (
            "a.json",
            {"query": "a", "demos": [{"input": "a", "label": "b", "x": 1}]},
            r"demonstration 0 must be",
        ),
        ("a.json", {"query": "a", "demos": [["a", " "]]}, r"a\.json: the label of demonstration 0 is empty"),
        ("a.json", {"query": "a", "template": "x"}, r'"template" must be an object, got a string'),
        ("a.json", {"query": "a", "template": {"in": "x"}}, r"a template has no field 'in'"),
        ("a.json", {"query": "a", "template": {"input": None}}, r'"input" must be a string, got null'),
        ("a.json", {"query": "a", "template": {"input": "x"}}, r"a\.json: the template's input 'x' has no"),
        (
            "a.json",
            {"text": "a : b\nc", "query": "d"},
            r"\"text\" is a whole prompt, so 'query' cannot be given with it",
        ),
        ("a.json", {"text": "a"}, r"a\.json: the prompt has no demonstration"),
        ("a.txt", "a : b\nc :\n---\n\npear :", r"a\.txt, line 5: the prompt has no demonstration"),
    ],
)
def test_refused_files(tmp_path: Path, name: str, content: object, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        load_prompts(write(tmp_path, name, content))


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no\.json is not a file: give the path"):
        load_prompts(tmp_path / "no.json")
    with pytest.raises(FileFormatError, match="is not a file"):
        load_prompts(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with pytest.raises(FileFormatError, match=r"x\.txt is not UTF-8 text \(byte 2\)"):
        load_prompts(tmp_path / "x.txt")
