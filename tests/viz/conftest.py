"""Decompositions to draw: of the bundled model, and of a random one with attention sinks."""

from __future__ import annotations

from typing import Any

import pytest
from families import make_bridge
from shown import prompt

from metaopt_lens import Decomposition, DecompositionSet, decompose, load_tiny, wrap
from metaopt_lens.experiments import ExperimentResult, RunConfig, run_experiment


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
    config = RunConfig(
        "tiny",
        "synthetic-2",
        shots=4,
        seeds=(0, 1),
        queries=3,
        lr=0.02,
        rules=("gd",),
        n_null_draws=2,
        random_weights=False,
        attribution_queries=1,
    )
    return run_experiment(config, tmp_path_factory.mktemp("run"), progress=False)
