"""What README.md and docs/ show on SmolLM2 runs as it stands, and README.md's numbers are those that come out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from shown_code import PAGES, README, run_commands, to_run

from metaopt_lens.decomposition import LogitContributionSet


@pytest.fixture(scope="module")
def said(name: str) -> LogitContributionSet:
    if name != "smollm2":
        pytest.skip("README.md shows SmolLM2")
    (block,) = to_run(README, "python", pretrained=True)
    names: dict[str, Any] = {}
    exec(block.code, names)
    found = names["said"]
    assert isinstance(found, LogitContributionSet)
    return found


def test_the_heads_are_those_named(said: LogitContributionSet) -> None:
    (named,) = re.findall(r"said\.heads\(3, part=\"zero_shot\"\)\)  # (.*)", README)
    assert [str(head) for head in said.heads(3, part="zero_shot")] == named.split(", ")


def test_the_sentence_is_true(said: LogitContributionSet) -> None:
    """Every number that README.md gives, to its last digit."""
    values = {
        "logit difference": said.logit.mean(),
        "heads reading the query": said.zero_shot.sum((1, 2)).mean(),
        "heads reading the demonstrations": said.meta_gradient.sum((1, 2)).mean(),
        "MLPs": said.mlp.sum(1).mean(),
        "embedding and biases": (said.embedding + said.biases).mean(),
    }
    for head in said.heads(3, part="zero_shot"):
        values[str(head)] = said.zero_shot[:, head.layer, head.head].mean()
    for name, value in values.items():
        (given,) = re.findall(rf"\b{name} ([+-]\d+\.\d\d)\b", README)
        assert float(value) == pytest.approx(float(given), abs=0.006), name


_ON_SMOLLM2 = [
    page
    for page in PAGES
    if page.name != "README.md"
    and any(to_run(page.read_text(encoding="utf-8"), language, pretrained=True) for language in ("python", "sh"))
]


@pytest.mark.parametrize("page", _ON_SMOLLM2, ids=lambda page: page.name)
def test_the_pages_of_the_documentation_run(
    name: str, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    if name != "smollm2":
        pytest.skip("the documentation shows SmolLM2")
    names: dict[str, Any] = {}
    for block in to_run(text, "python", pretrained=True):
        exec(block.code, names)
    monkeypatch.chdir(tmp_path)
    run_commands(text, pretrained=True)
