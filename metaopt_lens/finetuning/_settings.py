"""Everything that decides what finetuning does; stored with its result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from metaopt_lens._errors import OptionError

Projection = Literal["q", "k", "v", "o", "mlp_in", "mlp_gate", "mlp_out"]
Loss = Literal["all", "label"]
Readout = Literal["block", "attention"]
Order = Literal["given", "reversed", "shuffled"] | Sequence[int]
ATTENTION: tuple[Projection, ...] = ("q", "k", "v", "o")
MLP: tuple[Projection, ...] = ("mlp_in", "mlp_gate", "mlp_out")
PROJECTIONS = ATTENTION + MLP


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of `finetune`; the defaults are the paper's: one epoch of SGD on keys and values, one demonstration
    a step in the given order, cross-entropy over all predicted tokens.

    Attributes:
        lr: learning rate.
        epochs: passes over the demonstrations.
        projections: which are updated in every layer: ``"q"``, ``"k"``, ``"v"`` and ``"o"`` of the attention, and the
            MLP's matrices ``"mlp_in"``, ``"mlp_gate"`` (of a gated MLP) and ``"mlp_out"``.
        bias: also update the biases of the attention's projections, where the base has them; the MLP's stay.
        optimizer: name of a class in ``torch.optim``; optimizer_options are passed to it.
        loss: ``"all"`` predicted tokens of a demonstration (all but BOS), or those of its ``"label"`` only.
        order: ``"given"``, ``"reversed"``, ``"shuffled"`` (reshuffled every epoch, by seed), or a permutation.
        batch_size: demonstrations per step; None is full-batch. The loss is the mean over the demonstrations.
        layer_causal: every layer learns from its own early-exit loss only (LCGD, arXiv:2311.07772).
        readout: what LCGD reads out: the ``"block"`` output (as released) or the ``"attention"`` output (as written).
        seed: for ``order="shuffled"``.
    """

    lr: float
    epochs: int = 1
    projections: tuple[Projection, ...] = ("k", "v")
    bias: bool = True
    optimizer: str = "SGD"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    loss: Loss = "all"
    order: Literal["given", "reversed", "shuffled"] | tuple[int, ...] = "given"
    batch_size: int | None = 1
    layer_causal: bool = False
    readout: Readout = "block"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr must be a positive, finite number, got {self.lr}.")
        if self.epochs < 1:
            raise OptionError(f"epochs must be at least 1, got {self.epochs}.")
        unknown = [p for p in self.projections if p not in PROJECTIONS]
        if unknown or not self.projections or len(set(self.projections)) != len(self.projections):
            raise OptionError(
                f"projections must be one or several different ones of {', '.join(map(repr, PROJECTIONS))}, got "
                f"{self.projections!r}."
            )
        for name, value, allowed in (
            ("loss", self.loss, ("all", "label")),
            ("readout", self.readout, ("block", "attention")),
        ):
            if value not in allowed:
                raise OptionError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")
        if self.layer_causal and self.readout == "attention" and any(p in MLP for p in self.projections):
            raise OptionError(
                "readout='attention' reads a layer out before its MLP, which then learns nothing: 'block'."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, or None for full-batch, got {self.batch_size}.")
        if isinstance(self.order, str) and self.order not in {"given", "reversed", "shuffled"}:
            raise OptionError(f"order must be 'given', 'reversed', 'shuffled' or a permutation, got {self.order!r}.")
