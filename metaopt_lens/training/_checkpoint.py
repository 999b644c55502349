"""Checkpoints: a safetensors and a JSON file, complete or not there at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt_lens._errors import FileFormatError, ModelMismatchError
from metaopt_lens._storage import load_result, save_result
from metaopt_lens.training._language_model import LanguageModel
from metaopt_lens.training._training_config import TrainingConfig, differing_fields

KIND = "momentum training checkpoint"
_NAME = re.compile(r"step-(\d+)\.json")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood after `step` steps."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save_checkpoint(
    folder: Path,
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    config: TrainingConfig,
    corpus: str,
    history: dict[str, Any],
) -> Path:
    """Write weights, optimizer and random state, then remove older checkpoints; returns the path of the JSON."""
    tensors = {f"weights/{name}": t for name, t in _weights(lm).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    meta = {
        "step": step,
        "config": config.to_dict(),
        "n_vocab": lm.model.info.d_vocab,
        "corpus": corpus,
        "history": history,
    }
    written = save_result(folder / f"step-{step:08d}", kind=KIND, tensors=tensors, meta=meta)
    for other in _steps(folder):
        if other < step:
            for suffix in (".json", ".safetensors"):  # the JSON first: no pair is left that looks complete
                (folder / f"step-{other:08d}{suffix}").unlink(missing_ok=True)
    return written


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a folder; None if there is none.

    Raises:
        FileFormatError: it is damaged or cut short.
    """
    steps = _steps(folder)
    if not steps:
        return None
    path = folder / f"step-{max(steps):08d}"
    try:
        tensors, meta = load_result(path, kind=KIND)
    except FileFormatError as error:
        raise FileFormatError(
            f"the checkpoint cannot be used: {error} Remove step-{max(steps):08d}.json to start over."
        ) from None
    return Checkpoint(path, max(steps), tensors, meta)


def check_same_run(checkpoint: Checkpoint, config: TrainingConfig, corpus: str) -> None:
    """Raise `ModelMismatchError` naming the fields in which a checkpoint's configuration differs from this one."""
    differing = differing_fields(checkpoint.meta["config"], config.to_dict())
    if differing:
        raise ModelMismatchError(
            f"{checkpoint.path} was made with another configuration; {'; '.join(differing)}. Resume with the one it "
            "was made with, or choose another folder."
        )
    if checkpoint.meta["corpus"] != corpus:
        raise ModelMismatchError(
            f"{checkpoint.path} was made on other text (the corpus has changed since): choose another folder."
        )


def restore(checkpoint: Checkpoint, lm: LanguageModel, optimizer: torch.optim.Optimizer | None) -> None:
    """Put weights, and the optimizer's state if one is given, back where they were.

    Raises:
        FileFormatError: the tensors are not those of the model.
    """
    weights = _weights(lm)
    stored = _part(checkpoint.tensors, "weights/")
    if weights.keys() != stored.keys() or any(weights[name].shape != stored[name].shape for name in weights):
        raise FileFormatError(f"{checkpoint.path} does not hold the weights of this model.")
    with torch.no_grad():
        for name, target in weights.items():
            target.copy_(stored[name])
    if optimizer is None:
        return
    body = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _part(checkpoint.tensors, "optimizer/").items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": body["param_groups"]})


def restore_random_state(checkpoint: Checkpoint) -> None:
    """Put torch's global random state back where it was."""
    torch.set_rng_state(checkpoint.tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["rng/cuda"])


def _weights(lm: LanguageModel) -> dict[str, Tensor]:
    """Everything that is learned, by name."""
    named: dict[str, Tensor] = dict(lm.weights.named_parameters())
    if lm.logits_of_eta is not None:
        named["logits_of_eta"] = lm.logits_of_eta
    return named


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(found[1]) for file in folder.iterdir() if (found := _NAME.fullmatch(file.name))]
