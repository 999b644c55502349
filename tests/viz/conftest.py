"""Decompositions to draw: of the bundled model, and of a random one with attention sinks."""

from __future__ import annotations

from typing import Any

import pytest
from families import make_bridge
from runs import SMALL
from shown import prompt

from metaopt_lens import Decomposition, DecompositionSet, decompose, load_tiny, wrap
from metaopt_lens.experiments import ExperimentResult, run_experiment


@pytest.fixture(scope="session")
def tiny() -> Any:
    return wrap(load_tiny())


@pytest.fixture(scope="session")
def result(tiny: Any) -> Decomposition:
    return decompose(tiny, prompt())


@pytest.fixture(scope="session")
def everywhere(tiny: Any) -> Decomposition:
    return decompose(tiny, prompt(), position="all")


@pytest.fixture(scope="session")
def several(tiny: Any) -> DecompositionSet:
    return decompose(tiny, [prompt(query) for query in ("plum", "cherry", "grape")])


@pytest.fixture(scope="session")
def with_sinks() -> Decomposition:
    return decompose(make_bridge("gpt_oss"), "w7 : w8\nw9 : w10\nw11 :")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> ExperimentResult:
    """A whole run of seconds."""
    return run_experiment(SMALL, tmp_path_factory.mktemp("run"), progress=False)
