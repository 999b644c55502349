"""The command line, as a user meets it: what it prints, writes, refuses, and how soon it answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
from families import make_hf, tokenizer
from typer.testing import CliRunner, Result

from metaopt_lens import decompose, load_prompts, load_tiny
from metaopt_lens.cli import app

TEXT = "apple : dax\nhammer : wug\npear : dax\nsaw : wug\nplum :\n"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# ---- how soon it answers ---------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "transformer_lens", "numpy", "pandas", "plotly", "circuitsvis")


def heavy_imports(*arguments: str) -> tuple[set[str], str]:
    """Which heavy packages a fresh Python imports when run with these arguments, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    return imported & set(HEAVY), done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["decompose", "--help"], ["--version"]])
def test_help_answers_without_importing_torch(arguments: list[str]) -> None:
    imported, printed = heavy_imports("-m", "metaopt_lens", *arguments)
    assert imported == set()
    assert "metaopt-lens" in printed or "Usage" in printed


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert heavy_imports("-c", "import metaopt_lens.cli; import numpy")[0] == {"numpy"}
    assert "torch" in heavy_imports("-c", "import metaopt_lens; metaopt_lens.Decomposition")[0]


def test_help_names_the_commands() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert "demo" in shown.stdout
    assert "decompose" in shown.stdout
    assert "..." not in shown.stdout.partition("Commands:")[2]  # no sentence is cut off
    options = run("decompose", "--help").stdout
    for name in ("--model", "--prompt", "--dtype", "--device", "--heads", "--position", "--format", "--out"):
        assert name in options
    assert "--no-prepend-bos" in options


def test_version() -> None:
    assert run("--version").stdout == f"metaopt-lens {version('metaopt-lens')}\n"


# ---- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run("demo", "--out", out), out


def test_demo_prints_heads_answers_and_paths(demo: tuple[Result, Path]) -> None:
    result, out = demo
    assert result.exit_code == 0, result.output
    assert "Decomposition of metaopt-lens-tiny (3 layers x 4 heads)" in result.stdout
    assert re.search(r"zero-shot +\d+\.\d% +\d+\.\d%", result.stdout)
    assert re.search(r"in context +\d+\.\d% +\d+\.\d%", result.stdout)
    assert len(re.findall(r"^ +[0-2] +[0-3]( +[−\d.]+){7}$", result.stdout, flags=re.MULTILINE)) == 12
    for name in ("heads.csv", "heads.json", "report.html"):
        assert f"wrote {out / name}" in result.stdout.replace("\n", " ").replace("  ", " ")
        assert (out / name).stat().st_size > 1000


def test_demo_answers_right_only_in_context(demo: tuple[Result, Path]) -> None:
    data = json.loads((demo[1] / "heads.json").read_text(encoding="utf-8"))
    prediction = data["prompts"][0]["prediction"]
    right = prediction["correct"]
    assert prediction["in_context"]["answer"] == right
    assert prediction["in_context"]["labels"][right]["probability_among_candidates"] > 0.95
    assert prediction["zero_shot"]["labels"][right]["probability_among_candidates"] < 0.6


def test_demo_files_hold_the_same_table(demo: tuple[Result, Path]) -> None:
    table = pd.read_csv(demo[1] / "heads.csv")
    rows = pd.DataFrame(json.loads((demo[1] / "heads.json").read_text(encoding="utf-8"))["prompts"][0]["heads"])
    assert len(table) == 12
    pd.testing.assert_frame_equal(table, rows)


# ---- decompose -------------------------------------------------------------------------------------------------------


def test_decompose_gives_the_numbers_of_the_library(prompt_file: Path) -> None:
    result = run("decompose", "--model", "tiny", "--prompt", prompt_file, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    expected = decompose(load_tiny(), load_prompts(prompt_file)[0])
    assert data["model"]["name"] == "metaopt-lens-tiny"
    assert data["prompts"][0]["text"] == TEXT.rstrip()
    found = pd.DataFrame(data["prompts"][0]["heads"])
    frame = expected.to_frame()
    pd.testing.assert_frame_equal(
        found[frame.columns].reset_index(drop=True), frame, check_dtype=False, rtol=1e-4, atol=1e-5
    )


def test_decompose_a_local_model_in_bfloat16_at_all_positions(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_hf("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    prompts = tmp_path / "prompts.json"
    item = {"demos": [["w7", "w8"], ["w9", "w10"]], "queries": ["w11", "w12"]}
    prompts.write_text(json.dumps(item), encoding="utf-8")
    result = run(
        *("decompose", "--model", folder, "--prompt", prompts, "--dtype", "bfloat16", "--device", "cpu"),
        *("--heads", "L2H1,L0H3", "--position", "all", "--no-prepend-bos", "--format", "json"),
        *("--out", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)  # paths go to stderr, so that this can be piped
    assert "report.html" in result.stderr
    assert data["model"]["dtype"] == "bfloat16"
    assert len(data["prompts"]) == 2
    for item in data["prompts"]:
        assert {row["name"] for row in item["heads"]} == {"L0H3", "L2H1"}
        assert item["positions"] == [8, 9]
        assert len(item["heads"]) == 4
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'data-head="L2H1"' in report
    assert str(tmp_path) not in report
    assert len(pd.read_csv(tmp_path / "out" / "heads.csv")) == 2 * 2 * 12


def test_decompose_prints_the_heads_asked_for_in_their_order(prompt_file: Path) -> None:
    result = run("decompose", "--model", "tiny", "--prompt", prompt_file, "--heads", "L2H1, L0H3")
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^ +(\d) +(\d)(?: +[−\d.]+){7}$", result.stdout, flags=re.MULTILINE)
    assert rows == [("2", "1"), ("0", "3")]


def test_several_prompts_get_one_row_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{TEXT}---\n{TEXT.replace('plum', 'clamp')}", encoding="utf-8")
    result = run("decompose", "--model", "tiny", "--prompt", file)
    assert result.exit_code == 0, result.output
    assert re.search(r"plum : +\(not given\) +\w+ \d+\.\d% +dax \d+\.\d%", result.stdout)
    assert re.search(r"clamp : +\(not given\) +\w+ \d+\.\d% +wug \d+\.\d%", result.stdout)


def test_an_open_answer_is_printed_with_its_rank(tmp_path: Path) -> None:
    """The right label is that of no demonstration: terminal, JSON and page have it."""
    file = tmp_path / "open.json"
    demos = [["apple", "dax"], ["hammer", "wug"], ["pear", "dax"], ["saw", "wug"]]
    file.write_text(json.dumps({"demos": demos, "queries": ["plum"], "labels": ["kiki"]}), encoding="utf-8")
    result = run("decompose", "--model", "tiny", "--prompt", file)
    assert result.exit_code == 0, result.output
    assert "kiki ✓" in result.stdout
    printed = " ".join(result.stdout.split())
    assert re.search(r"first token \(kiki\) in the whole vocabulary: \d+ zero-shot and \d+ in context", printed)
    data = json.loads(run("decompose", "--model", "tiny", "--prompt", file, "--format", "json").stdout)
    found = data["prompts"][0]["prediction"]
    assert list(found["in_context"]["labels"]) == ["dax", "wug", "kiki"]
    assert found["in_context"]["right_label_rank"] > 2
    values = [label["probability"] for label in found["in_context"]["labels"].values()]
    assert found["in_context"]["candidates_probability"] == pytest.approx(sum(values))
    assert found["in_context"]["top_tokens"][0]["token"] == "dax"


# ---- what it refuses -------------------------------------------------------------------------------------------------


def refused(*arguments: str | Path) -> str:
    """The one line on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "absent.txt is not a file" in refused("decompose", "--model", "tiny", "--prompt", tmp_path / "absent.txt")
    assert "holds no prompt: it is empty" in refused("decompose", "--model", "tiny", "--prompt", empty)
    empty.write_text("apple : dax")
    assert "has no demonstration" in refused("decompose", "--model", "tiny", "--prompt", empty)
    broken = tmp_path / "broken.json"
    broken.write_text('{"demos": [')
    assert "broken.json, line 1: not valid JSON" in refused("decompose", "--model", "tiny", "--prompt", broken)


def test_unknown_heads_are_refused(prompt_file: Path) -> None:
    line = refused("decompose", "--model", "tiny", "--prompt", prompt_file, "--heads", "L1H1,L9H9")
    assert "there is no head L9H9: the model has layers 0 to 2 with heads 0 to 3" in line
    assert "cannot read 'third'" in refused("decompose", "--model", "tiny", "--prompt", prompt_file, "--heads", "third")


def test_unknown_models_are_refused(prompt_file: Path, tmp_path: Path) -> None:
    line = refused("decompose", "--model", "no-such-model-xyz", "--prompt", prompt_file)
    assert "'no-such-model-xyz' was not found" in line
    assert "give a local folder" in line
    assert "there is no file or folder" in refused("decompose", "--model", tmp_path / "no", "--prompt", prompt_file)


def test_unknown_words_and_positions_are_refused(prompt_file: Path) -> None:
    assert "position 2 is not in the query" in refused(
        "decompose", "--model", "tiny", "--prompt", prompt_file, "--position", "2"
    )
    assert "--position must be last, all or a token index, got 'first'" in refused(
        "decompose", "--model", "tiny", "--prompt", prompt_file, "--position", "first"
    )
    prompt_file.write_text(TEXT.replace("plum", "spaceship"), encoding="utf-8")
    assert "the tokenizer does not know 'spaceship'" in refused("decompose", "--model", "tiny", "--prompt", prompt_file)


def test_an_output_folder_that_is_a_file_is_refused(prompt_file: Path) -> None:
    result = run("decompose", "--model", "tiny", "--prompt", prompt_file, "--out", prompt_file)
    assert result.exit_code == 2
    assert "cannot write into" in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_options_are_refused_by_the_parser(prompt_file: Path) -> None:
    assert run("decompose", "--model", "tiny", "--prompt", prompt_file, "--dtype", "int8").exit_code == 2
    assert run("decompose", "--model", "tiny").exit_code == 2
    assert run("compose").exit_code == 2


def test_a_real_process_exits_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "metaopt_lens", "decompose", "--model", "tiny", "--prompt", "absent.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: absent.json is not a file: give the path of a .json, .jsonl or text file of prompts.\n"
    )


# ---- answers and contexts --------------------------------------------------------------------------------------------


def test_an_answers_logit_is_taken_apart(prompt_file: Path, tmp_path: Path) -> None:
    done = run("decompose", "--model", "tiny", "--prompt", prompt_file, "--answer", "kiki", "--versus", "dax, wug",
               "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = decompose(load_tiny(), load_prompts(prompt_file)[0]).logits("kiki", versus=["dax", "wug"])
    assert f"{float(found.logit):+.3f}" in done.output
    assert "heads, reading the query" in done.output
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "The logit of <code>kiki</code> minus the mean of <code>dax</code>, <code>wug</code>" in page


def test_a_context_is_decomposed_chunk_by_chunk(tmp_path: Path) -> None:
    context = tmp_path / "context.txt"
    context.write_text("apple dax\nhammer wug\npear dax\n", encoding="utf-8")
    asked = ["--context", context, "--chunks", "line", "--query", "plum :", "--answer", "dax"]
    done = run("decompose", "--model", "tiny", *asked)
    assert done.exit_code == 0, done.output
    assert "3 demonstrations" in done.output
    assert "Logit of 'dax'" in done.output


def test_a_context_needs_a_query(prompt_file: Path) -> None:
    for given in (["--context", prompt_file], ["--prompt", prompt_file, "--query", "x"], []):
        done = run("decompose", "--model", "tiny", *given)
        assert done.exit_code != 0
        assert "give --prompt FILE, or --context FILE with --query TEXT" in done.output
