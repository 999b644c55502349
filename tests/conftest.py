"""Shared fixtures: small random models, made on the spot."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a hub run only when asked for."""
    if os.environ.get("METAOPT_LENS_NETWORK") == "1":
        return
    skip = pytest.mark.skip(reason="needs a model hub: set METAOPT_LENS_NETWORK=1 to run it")
    for item in items:
        if "network" in item.keywords:
            item.add_marker(skip)
