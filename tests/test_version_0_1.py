"""Files that version 0.1 wrote are read, or refused with a sentence that says so.

The files under ``version_0_1/`` are of a random GPT-2 of 3 layers, written by the release itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import build

from metaopt_lens import Comparison, Decomposition, DecompositionSet, MetaGradient, WeightUpdate
from metaopt_lens._errors import FileFormatError
from metaopt_lens.experiments import ExperimentResult, SweepResult
from metaopt_lens.interventions import HeadEffects

FILES = Path(__file__).parent / "version_0_1"


def test_weight_updates_are_read_and_applied() -> None:
    update = WeightUpdate.load(FILES / "update")
    assert update.settings is not None
    assert (update.settings.lr, update.settings.optimizer, len(update.losses)) == (0.3, "SGD", 4)
    assert update.trained_on is None  # 0.1 did not say
    assert update.norm() == pytest.approx(0.8468, abs=1e-4)
    assert update.provenance["metaopt-lens"]
    model = build("bridge:gpt2")
    tokens = torch.tensor([[1, 30, 31]])
    with torch.no_grad():
        before = model(tokens)
        with update.applied(model):
            assert (model(tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (Decomposition, "decomposition", "outputs but not the runs: decompose the prompt again"),
        (DecompositionSet, "set", "outputs but not the runs: decompose the prompt again"),
        (MetaGradient, "meta_gradient", r"Make a new one with meta_gradient\(model, \.\.\.\)"),
        (HeadEffects, "head_effects", r"measure them again with head_effects\(model, prompts\)"),
        (Comparison, "comparison", "whose null 'label-shuffled' is not what its name says: compare again"),
        (ExperimentResult, "run", "whose shuffled labels, intervals and counts were wrong: run it again in a new dir"),
    ],
)
def test_results_that_lack_what_is_needed_are_refused_by_version(kind: Any, name: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=rf"metaopt-lens 0\.1.*{message}"):
        kind.load(FILES / name)


def test_the_runs_of_a_sweep_are_refused_likewise(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_bytes((FILES / "run" / "run.json").read_bytes())
    (tmp_path / "sweep.json").write_text('{"kind": "metaopt-lens sweep", "runs": {"a": "0"}}')
    with pytest.raises(FileFormatError, match=r"holds a run of metaopt-lens 0\.1"):
        _ = SweepResult.load(tmp_path).runs
