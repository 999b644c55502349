"""docs/dev/where.md answers every question with a file that is there and a name it defines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (?P<question>[^|]+) \| `(?P<file>[\w/]+\.py)`(?: \((?P<names>[^)]+)\))? \|$", re.MULTILINE)
ROWS = [match.groupdict() for match in ROW.finditer((ROOT / "docs/dev/where.md").read_text(encoding="utf-8"))]


def test_every_line_of_the_tables_is_read() -> None:
    lines = (ROOT / "docs/dev/where.md").read_text(encoding="utf-8").splitlines()
    assert len(ROWS) == sum(line.startswith("| ") for line in lines) - 2  # two headings
    assert len(ROWS) > 15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["question"])
def test_the_file_defines_the_name(row: dict[str, str | None]) -> None:
    source = (ROOT / "metaopt_lens" / str(row["file"])).read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+)`", row["names"] or ""):
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.*=", source, re.MULTILINE), (row["file"], name)


@pytest.mark.parametrize("file", re.findall(r"[ `](\w+/\w+\.py)", (ROOT / "docs/dev/walk.md").read_text("utf-8")))
def test_the_walk_goes_through_files_that_are_there(file: str) -> None:
    assert (ROOT / "metaopt_lens" / file).is_file()


def test_docstrings_name_sections_of_the_theory_that_are_there() -> None:
    """By number, as in ``docs/theory.md, sections 2 and 5``; every section is named somewhere."""
    theory = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    there = set(re.findall(r"^## (\d+)\. ", theory, re.MULTILINE))
    named: set[str] = set()
    for path in (ROOT / "metaopt_lens").rglob("*.py"):
        for reference in re.findall(r"docs/theory\.md, ([^;:.)]*)", path.read_text(encoding="utf-8")):
            numbers = re.match(r"sections? (\d+(?: and \d+)*)", reference)
            assert numbers, (path.name, reference)
            named |= set(numbers[1].split(" and "))
    assert named == there


def test_no_two_modules_have_one_name() -> None:
    files = [path.name for path in (ROOT / "metaopt_lens").rglob("*.py") if not path.name.startswith("__")]
    assert len(files) > 100
    assert len(set(files)) == len(files)
