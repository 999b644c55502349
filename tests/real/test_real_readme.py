"""What README.md shows on a pretrained model runs as it stands, and gives the numbers that stand there."""

from __future__ import annotations

import re
from typing import Any

import pytest
from readme import PRETRAINED_BLOCKS, README

from metaopt_lens.decomposition import LogitContributionSet


@pytest.fixture(scope="module")
def said(name: str) -> LogitContributionSet:
    if name != "smollm2":
        pytest.skip("README.md shows SmolLM2")
    (code,) = PRETRAINED_BLOCKS
    assert f'load_model("{name}")' in code
    names: dict[str, Any] = {}
    exec(code, names)
    found = names["said"]
    assert isinstance(found, LogitContributionSet)
    return found


def test_the_heads_are_those_named(said: LogitContributionSet) -> None:
    (named,) = re.findall(r"said\.heads\(3, part=\"zero_shot\"\)  # (.*)", README)
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
