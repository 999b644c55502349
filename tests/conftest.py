"""How the suite computes, and which tests run.

float32 results differ in their last digits between processors, numbers of threads and kernels. To try other kernels on
one machine: ``ATEN_CPU_CAPABILITY=default`` (``avx2``, ``avx512``) chooses PyTorch's own instructions, and
``MKL_CBWR=COMPATIBLE`` (``AVX2``) those of MKL's matrix products; ``METAOPT_LENS_MKLDNN=0`` switches oneDNN off, and
``METAOPT_LENS_THREADS=2`` computes with two threads.
"""

from __future__ import annotations

import os

import pytest
import torch

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
