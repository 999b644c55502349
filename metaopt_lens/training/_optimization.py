"""One step of gradient descent: the learning rate, the loss, the optimizer."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from metaopt_lens.training._corpora import Batch
from metaopt_lens.training._language_model import LanguageModel
from metaopt_lens.training._training_config import TrainingConfig
from metaopt_lens.training._training_settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Of a step counted from 0: linear warm-up, then decay to ``lr x last`` at the end."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    progress = min(1.0, max(0, step - settings.warmup) / max(settings.steps - settings.warmup, 1))
    if settings.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = (1 - progress) ** settings.power
    return settings.lr * warm * (settings.last + (1 - settings.last) * shape)


def training_step(
    lm: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainingConfig, step: int
) -> float:
    """One step of gradient descent; returns the loss before it."""
    o, device = config.optimizer, lm.model.device
    rate = learning_rate(o, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    tokens, weights = batch.tokens.to(device), batch.weights.to(device)
    half = o.precision == "bfloat16" or (o.precision == "auto" and device.type == "cuda")
    with lm.with_momentum():
        with torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext():
            logits = lm.logits(tokens)[:, :-1]
        loss = _loss(logits.float(), tokens[:, 1:], weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], o.clip)
    optimizer.step()
    return float(loss.detach())


def _loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * weights.flatten()).sum() / weights.sum()


def make_optimizer(lm: LanguageModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the weights, and a learned eta at its own rate; only matrices decay."""
    o = config.optimizer
    parameters = list(lm.weights.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay, "factor": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "factor": 1.0},
    ]
    if lm.logits_of_eta is not None:
        groups.append({"params": [lm.logits_of_eta], "weight_decay": 0.0, "factor": config.momentum.lr_factor})
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2))
