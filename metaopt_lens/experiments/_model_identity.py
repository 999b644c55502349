"""Which model it is: sizes, revision on the hub, and a fingerprint of the weights."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from metaopt_lens.models import LensModel

_SAMPLES = 4096  # values of every tensor that are read: enough to notice another checkpoint, cheap on large models


def model_identity(model: LensModel) -> dict[str, Any]:
    """JSON-able facts that must agree for two runs to be of one model (its name apart)."""
    info = dataclasses.asdict(model.info)
    return {
        "name": info.pop("name"),
        **info,
        "processing": list(model.info.processing),
        "revision": _revision(model.host),
        "fingerprint": _fingerprint(model.host),
    }


def _fingerprint(host: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(host.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _SAMPLES)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _revision(host: Any) -> str | None:
    """The hub's commit, which transformers leaves in the configuration of what it downloaded."""
    config = getattr(getattr(host, "original_model", None), "config", None)
    found = getattr(config, "_commit_hash", None)
    return found if isinstance(found, str) else None
