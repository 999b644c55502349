"""docs/_results.py: the committed pages are what it writes, and every number on them is one of the tables'."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from metaopt_lens.experiments import CLAIMS, SweepResult

DOCS = Path(__file__).parent.parent / "docs"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_script", DOCS / "_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(small_sweep: SweepResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    small_sweep.export(folder / "data")
    expected = '[mine]\nwritten = 2026-01-02\nrun = "run --model tiny --task synthetic --shots 8"\nuphill = "It is."\n'
    (folder / "data" / "expected.toml").write_text(expected, encoding="utf-8")
    script = _script()
    script.write_pages(script.Data(folder / "data"), folder)
    return folder


def test_the_committed_pages_are_what_the_script_writes(tmp_path: Path) -> None:
    script = _script()
    files = script.write_pages(script.Data(DOCS / "data"), tmp_path)
    assert {"results.md", "claims.md"} < {file.name for file in files}
    for file in files:
        committed = DOCS / file.relative_to(tmp_path)
        assert committed.read_text("utf-8") == file.read_text("utf-8"), f"{committed}: run python docs/_results.py"
    assert {f.name for f in (DOCS / "images").glob("claim-*.svg")} == {f.name for f in files if f.suffix == ".svg"}


def test_the_readme_says_what_the_tables_say() -> None:
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    script = _script()
    assert script.with_headline(readme, script.Data(DOCS / "data")) == readme, "run python docs/_results.py"


def test_the_headline_counts_the_runs_in_which_both_work() -> None:
    """By hand from findings.csv: the answers to the two questions, of pretrained models with natural labels."""
    found = pd.read_csv(DOCS / "data" / "findings.csv")
    found = found[found["model"].isin(["smollm2", "gemma3-270m"]) & (found["labels"] == "natural")]
    axes = ["model", "task", "shots", "rule"]
    yes = (
        found[found["key"].isin(["in_context_learning", "finetuning"]) & (found["answer"] == "yes")]
        .groupby(axes)
        .size()
    )
    both = yes[yes == 2].index
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    assert f"in {len(both)} of {found.groupby(axes).ngroups} runs" in readme
    cosines = found[found["key"] == "direction"].set_index(axes)["estimate"][both]
    assert f"mean cosine {cosines.min():+.2f} to {cosines.max():+.2f}" in readme


def test_a_page_of_two_small_runs_says_what_is_in_their_tables(written: Path) -> None:
    page = (written / "results.md").read_text("utf-8")
    accuracies = pd.read_csv(written / "data" / "accuracies.csv")
    for task, own in accuracies.groupby("task"):
        value = own.set_index("quantity")["value"]
        row = next(line for line in page.splitlines() if line.startswith(f"| tiny | {task} (8 shots)"))
        for name in ("accuracy ZS", "accuracy ICL", "accuracy FT"):
            assert f"{value[name]:.2f}" in row
        assert "| 24 |" in row
    assert "In 0 of 2 runs both are shown to work" in page
    assert "No run here can say: it takes `--patch`." in page
    headings = [f"### {claim.text}" for claim in CLAIMS]
    assert sum(heading in page for heading in headings) == sum(len(s.claims) for s in _script().SECTIONS)


def test_what_was_expected_stands_next_to_what_came(written: Path) -> None:
    page = (written / "results.md").read_text("utf-8")
    assert "Written 2026-01-02: `run --model tiny --task synthetic --shots 8`" in page
    findings = pd.read_csv(written / "data" / "findings.csv")
    own = findings[(findings["task"] == "synthetic") & (findings["key"] == "control:uphill")].iloc[0]
    row = next(line for line in page.splitlines() if line.startswith("| It is. |"))
    summary = pd.read_csv(written / "data" / "summary.csv")
    cosine = summary[(summary["task"] == "synthetic") & (summary["statistic"] == "z total")].iloc[0]
    assert f"z total {cosine['value']:.3f} [" in row  # the number itself, next to the difference that the claim reads
    assert f"{own['estimate']:+.3f} [{own['low']:+.3f}, {own['high']:+.3f}], undecided" in row


def test_the_pages_name_every_run_and_only_pictures_that_are_there(written: Path) -> None:
    page, claims = ((written / name).read_text("utf-8") for name in ("results.md", "claims.md"))
    pictures = re.findall(r"!\[[^\]]+\]\((images/[\w-]+\.svg)\)", page)
    assert sorted(pictures) == sorted(f"images/{f.name}" for f in (written / "images").iterdir())
    assert len(pictures) > 8
    runs = json.loads((written / "data" / "provenance.json").read_text("utf-8"))["runs"]
    assert all(f"--task {run['config']['task']} " in claims for run in runs.values())


def test_a_picture_draws_the_interval_where_the_axis_says(written: Path) -> None:
    root = ElementTree.fromstring((written / "images" / "claim-uphill.svg").read_text("utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    findings = pd.read_csv(written / "data" / "findings.csv")
    own = findings[findings["key"] == "control:uphill"]
    ticks = [(float(t.text or "nan"), float(t.attrib["x"])) for t in root.iter(f"{space}text")
             if t.attrib.get("text-anchor") == "middle"]  # fmt: skip
    (v0, x0), (v1, x1) = ticks[0], ticks[-1]
    dots = [float(c.attrib["cx"]) for c in root.iter(f"{space}circle")]
    np.testing.assert_allclose([v0 + (x - x0) * (v1 - v0) / (x1 - x0) for x in dots], own["estimate"], atol=5e-3)
