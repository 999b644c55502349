"""How the suite computes, and which tests run.

float32 results differ in their last digits between processors, numbers of threads and kernels. To try other kernels on
one machine: ``ATEN_CPU_CAPABILITY=default`` (``avx2``, ``avx512``) chooses PyTorch's own instructions, and
``MKL_CBWR=COMPATIBLE`` (``AVX2``) those of MKL's matrix products; ``METAOPT_LENS_MKLDNN=0`` switches oneDNN off, and
``METAOPT_LENS_THREADS=2`` computes with two threads.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from metaopt_lens.experiments import SweepResult

# The models are tiny: threads would only wait for each other.
torch.set_num_threads(int(os.environ.get("METAOPT_LENS_THREADS", "1")))
torch.backends.mkldnn.enabled = os.environ.get("METAOPT_LENS_MKLDNN", "1") != "0"  # type: ignore[assignment]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a hub run only when asked for."""
    if os.environ.get("METAOPT_LENS_NETWORK") == "1":
        return
    skip = pytest.mark.skip(reason="needs a model hub: set METAOPT_LENS_NETWORK=1 to run it")
    for item in items:
        if "network" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def small_sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Two tasks of the bundled model, three demonstration sets each."""
    from metaopt_lens.experiments import (
        SweepConfig,
        run_sweep,
    )  # not above: types are checked in what is imported later

    config = SweepConfig(
        ("tiny",),
        ("synthetic", "synthetic-3"),
        shots=(8,),
        lr=(0.05,),
        seeds=(0, 1, 2),
        settings={"queries": 8, "rules": ["gd"], "attribution": False, "n_null_draws": 2},
    )
    return run_sweep(config, tmp_path_factory.mktemp("small") / "sweep", progress=False)
