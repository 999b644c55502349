"""Gradient descent on changes of the weights that start at zero; the model's own parameters never move."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from metaopt_lens._errors import NonFiniteError, OptionError
from metaopt_lens.dual import is_finite
from metaopt_lens.finetuning._added import change_hooks
from metaopt_lens.finetuning._examples import TrainingExample
from metaopt_lens.finetuning._losses import layer_causal_losses, ordinary_loss
from metaopt_lens.finetuning._settings import MLP, FinetuneSettings
from metaopt_lens.finetuning._tape import Tape
from metaopt_lens.finetuning._update import StepFactors, WeightUpdate
from metaopt_lens.models import Hook, LensModel

Leaves = dict[str, list[Tensor]]
Step = tuple[float, Tape]  # the loss before the step, and what its gradients are made of
_DIVERGED = 2.0  # times the loss of guessing, or that of the first step if it is higher


@dataclass(frozen=True, eq=False)
class Descent:
    """Finetuning of one model on some examples, at one learning rate or several.

    Attributes:
        model: the base, wrapped.
        examples: what is learned.
        settings: how.
        optimizer: a class of `torch.optim`.
    """

    model: LensModel
    examples: Sequence[TrainingExample]
    settings: FinetuneSettings
    optimizer: Callable[..., torch.optim.Optimizer]

    def __post_init__(self) -> None:
        order, n = self.settings.order, len(self.examples)
        if not isinstance(order, str) and sorted(order) != list(range(n)):
            raise OptionError(f"order must be a permutation of 0 to {n - 1}, got {list(order)}.")

    def run(self, *, keep_factors: bool = False, progress: bool = False) -> WeightUpdate:
        """Train at the learning rate of the settings (see `finetune`)."""
        return self._descend(self.settings, keep_factors=keep_factors, progress=progress)

    def at(self, lr: float) -> WeightUpdate:
        """Train at another rate. The first step's gradients, those of the base model, are computed once for all rates.

        Raises:
            NonFiniteError: a loss is NaN, infinite, or above twice that of the first step and twice that of guessing,
                ln(vocabulary). The rate is given up at that step.
        """
        guessing = math.log(self.model.info.d_vocab) * (self.model.info.n_layers if self.settings.layer_causal else 1)
        settings = dataclasses.replace(self.settings, lr=lr)
        return self._descend(settings, first=self._first, limit=_DIVERGED * max(self._first[0], guessing))

    @cached_property
    def _first(self) -> Step:
        leaves = _leaves(self.model, self.settings)
        return _step(self.model, self._batch(next(_schedule(len(self.examples), self.settings))), leaves, self.settings)

    def _batch(self, indices: Sequence[int]) -> list[TrainingExample]:
        return [self.examples[index] for index in indices]

    def _descend(
        self,
        settings: FinetuneSettings,
        *,
        first: Step | None = None,
        limit: float = math.inf,
        keep_factors: bool = False,
        progress: bool = False,
    ) -> WeightUpdate:
        schedule = list(_schedule(len(self.examples), settings))
        leaves = _leaves(self.model, settings)
        stepper = _stepper(self.optimizer, leaves, settings)
        losses: list[float] = []
        factors: list[StepFactors] = []
        for number, indices in enumerate(
            tqdm(schedule, desc="finetuning", unit="step", disable=None if progress else True)
        ):
            batch = self._batch(indices)
            if number == 0 and first is not None:
                loss, tape = first
            else:
                loss, tape = _step(self.model, batch, leaves, settings, queries=keep_factors)
            losses.append(loss)
            if not loss <= limit or not math.isfinite(loss):
                raise NonFiniteError(
                    f"the loss became {loss} at step {number} of {len(schedule)} (lr {settings.lr:g}): try a smaller "
                    "learning rate. The model is unchanged."
                )
            tape.write_gradients(leaves)
            stepper.step()
            if keep_factors:
                factors.append(tape.factors(batch))
        final: dict[str, Any] = {
            name: torch.stack([_heads_first(name, leaf) for leaf in tensors]) for name, tensors in leaves.items()
        }
        if not all(is_finite(tensor) for tensor in final.values()):
            raise NonFiniteError(
                f"the update became NaN or infinite by step {len(schedule) - 1} of {len(schedule)} (lr "
                f"{settings.lr:g}): try a smaller learning rate. The model is unchanged."
            )
        return WeightUpdate(
            self.model.info,
            **final,
            losses=tuple(losses),
            settings=settings,
            factors=tuple(factors) if keep_factors else None,
            trained_on=tuple(example.ids for example in self.examples),
        )


def _step(
    model: LensModel,
    batch: list[TrainingExample],
    leaves: Leaves,
    settings: FinetuneSettings,
    *,
    queries: bool = False,
) -> Step:
    """Loss of a batch under the changes so far, and its gradients' factors."""
    tape = Tape(model, settings.projections, queries=queries)
    hooks: list[Hook] = []
    for layer in range(model.info.n_layers):
        changes = {name: _heads_first(name, tensors[layer]) for name, tensors in leaves.items()}
        hooks += change_hooks(model, layer, changes, seen=tape.layer(layer))
        hooks += tape.query_hooks(layer)
    if settings.layer_causal:
        value = layer_causal_losses(model, batch, hooks, settings.readout).sum()
    else:
        value = ordinary_loss(model, batch, hooks)
    loss = float(value.detach())
    if math.isfinite(loss):
        tape.backward(value)
    return loss, tape


def _stepper(
    optimizer: Callable[..., torch.optim.Optimizer], leaves: Leaves, settings: FinetuneSettings
) -> torch.optim.Optimizer:
    parameters = [leaf for tensors in leaves.values() for leaf in tensors]
    stepper = optimizer(parameters, lr=settings.lr, **settings.optimizer_options)
    if any(group.get("weight_decay") for group in stepper.param_groups):
        raise OptionError(
            f"{settings.optimizer} has weight decay, which would pull the change of the weights towards 0, not the "
            "weights: set optimizer_options={'weight_decay': 0}."
        )
    return stepper


def _schedule(n_examples: int, settings: FinetuneSettings) -> Iterator[list[int]]:
    """Indices of the examples of every step."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_size or n_examples
    for _ in range(settings.epochs):
        if settings.order == "shuffled":
            order = torch.randperm(n_examples, generator=generator).tolist()
        elif settings.order == "reversed":
            order = list(reversed(range(n_examples)))
        elif settings.order == "given":
            order = list(range(n_examples))
        else:
            order = list(settings.order)
        for start in range(0, n_examples, size):
            yield order[start : start + size]


def _leaves(model: LensModel, settings: FinetuneSettings) -> Leaves:
    """Zero changes of every layer, with room for their gradients.

    Weights of q, k and v are ``[d_model, head, d_head]`` and the MLP's ``[d_in, d_out]``: the matrices that x is
    multiplied with, uncopied.

    Raises:
        OptionError: the MLP has no gate.
        UnsupportedModelError: the MLP cannot be read.
    """
    info = model.info
    dtype = getattr(torch, info.dtype)
    dtype = torch.float32 if dtype in {torch.float16, torch.bfloat16} else dtype
    leaves: Leaves = {}

    def zeros(*shape: int) -> list[Tensor]:
        found = [torch.zeros(shape, dtype=dtype, device=model.device) for _ in range(info.n_layers)]
        for leaf in found:
            leaf.grad = torch.zeros_like(leaf)
        return found

    for projection in settings.projections:
        if projection in MLP:
            d_out, d_in = _mlp_shape(model, projection)
            leaves[f"w_{projection}"] = zeros(d_in, d_out)
            continue
        heads = info.n_kv_heads if projection in "kv" else info.n_heads
        is_out = projection == "o"
        leaves[f"w_{projection}"] = (
            zeros(heads, info.d_head, info.d_model) if is_out else zeros(info.d_model, heads, info.d_head)
        )
        if settings.bias and all(model.has_bias(projection, layer) for layer in range(info.n_layers)):
            leaves[f"b_{projection}"] = zeros(info.d_model) if is_out else zeros(heads, info.d_head)
    return leaves


def _mlp_shape(model: LensModel, projection: str) -> tuple[int, int]:
    """Of one of the MLP's matrices, which is the same in every layer."""
    name = projection.removeprefix("mlp_")
    sites = [model.mlp_site(layer) for layer in range(model.info.n_layers)]
    if name == "gate" and any(name not in site.matrices for site in sites):
        raise OptionError(f"the MLP of {model.info.name} is not gated: leave 'mlp_gate' out of the projections.")
    shapes = {tuple((site.w_out if name == "out" else site.matrices[name]).shape) for site in sites}
    if len(shapes) > 1:
        raise OptionError(f"the MLPs of {model.info.name} have different sizes ({sorted(shapes)}): leave them out.")
    d_out, d_in = shapes.pop()
    return d_out, d_in


def _heads_first(name: str, leaf: Tensor) -> Tensor:
    """From the layout of `_leaves` to that of `WeightUpdate`."""
    return leaf if name[0] == "b" or name == "w_o" else leaf.transpose(0, 1)
