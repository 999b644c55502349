"""The table of families, the tests' list and the documentation name the same ones and say the same of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import FAMILIES, NATIVE, make_config
from hosts import HOST_NAMES, shared
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from metaopt_lens import wrap
from metaopt_lens.models import _families as families
from metaopt_lens.models._families import family_of
from metaopt_lens.models._rotation import PLAIN, ROTATED

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
SUPPORTED = {family.name: family for family in families.FAMILIES if family.name}


def documented() -> dict[str, str]:
    """First cell of every row of the table of supported models, and where it says queries and keys are seen."""
    lines = DOCS.read_text(encoding="utf-8").partition("\n## ")[0].splitlines()  # another table is further down
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|") and not line.startswith("|---")]
    return {row[0].strip(): row[1].strip() for row in rows[1:]}


def test_every_family_is_documented_and_nothing_else_is() -> None:
    found = set()
    for cell, seen in documented().items():
        if cell.startswith("`HookedTransformer`"):
            continue
        cell = re.sub(r"\s*\([^)]*\)", "", cell)  # remarks such as "(Pythia)"
        for name in cell.split(", "):
            assert SUPPORTED[name].reader.label == seen, name
            found.add(name)
    assert found == set(SUPPORTED)


def test_every_family_is_tested() -> None:
    tested = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[make_config(family).model_type] for family in FAMILIES}
    assert NATIVE
    assert tested | {"TransformerLensNative"} == {family.architecture for family in SUPPORTED.values()}


def test_architectures_are_listed_once() -> None:
    names = [(family.architecture, family.positions) for family in families.FAMILIES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if not name.startswith("hooked:")])
def test_models_have_the_row_of_their_architecture(name: str) -> None:
    info = wrap(shared(name)).info
    assert family_of(info.architecture, info.positions).architecture == info.architecture
    assert family_of(info.architecture, info.positions) in families.FAMILIES


def test_an_unknown_family_is_taken_for_an_ordinary_one() -> None:
    assert family_of("NewForCausalLM", "rotary").reader is ROTATED
    assert family_of("NewForCausalLM", "learned").reader is PLAIN
    assert not family_of("NewForCausalLM", "rotary").post_norm
