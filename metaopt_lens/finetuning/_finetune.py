"""finetune(): gradient descent on a frozen base (docs/theory.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from metaopt_lens._errors import ModelMismatchError, NonFiniteError, OptionError
from metaopt_lens.dual import is_finite
from metaopt_lens.finetuning._examples import TrainingExample, text_examples, training_examples
from metaopt_lens.finetuning._losses import layer_causal_losses, ordinary_loss
from metaopt_lens.finetuning._settings import FinetuneSettings, Loss, Order, Projection, Readout
from metaopt_lens.finetuning._tape import Tape
from metaopt_lens.finetuning._update import StepFactors, WeightUpdate, change_hooks
from metaopt_lens.models import Hook, LensModel, wrap
from metaopt_lens.prompts import Demo, ICLPrompt, PromptLike, Template, as_prompt


def finetune(
    model: Any,
    demos: PromptLike | Sequence[Demo | tuple[str, str]] | Sequence[str],
    *,
    lr: float,
    epochs: int = 1,
    projections: Sequence[Projection] = ("k", "v"),
    bias: bool = True,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    optimizer_options: dict[str, Any] | None = None,
    loss: Loss = "all",
    order: Order = "given",
    batch_size: int | None = 1,
    layer_causal: bool = False,
    readout: Readout = "block",
    seed: int = 0,
    template: Template | None = None,
    prepend_bos: bool | None = None,
    keep_factors: bool = False,
    allow_processed: bool = False,
    progress: bool = True,
) -> WeightUpdate:
    """Learn the demonstrations by gradient descent, next to the model rather than in it.

    A hook adds ``x_i dW_K + db_K`` to every key before rotary and QK-norm (values likewise), and dW starts at 0; SGD
    on dW is SGD on the projection itself. Defaults are the setting of arXiv:2212.10559: see `FinetuneSettings`.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model; never modified.
        demos: demonstrations, a prompt (in the forms `decompose` takes; its demonstrations and template are taken), or
            a list of plain texts.
        template: the text around input and label; the prompt's own for an `ICLPrompt`.
        keep_factors: also keep every step's inputs, error signals and queries (memory: steps x layers x tokens).
        allow_processed: accept a model with folded norms or biases, whose update is another one.
        progress: show a progress bar (on a terminal).

    Other arguments: see `FinetuneSettings`.

    Returns:
        A `WeightUpdate`.

    Raises:
        OptionError: a setting that makes no sense (lr not finite or not positive, unknown projection, ...).
        PromptError: no demonstrations, or one that cannot be tokenised.
        ModelMismatchError: the model's weights are processed and `allow_processed` is not set.
        NonFiniteError: a loss became NaN or infinite; nothing is half-applied.
    """
    settings = FinetuneSettings(
        lr=float(lr),
        epochs=epochs,
        projections=tuple(projections),
        bias=bias,
        optimizer=getattr(optimizer, "__name__", repr(optimizer)),
        optimizer_options=dict(optimizer_options or {}),
        loss=loss,
        order=order if isinstance(order, str) else tuple(order),
        batch_size=batch_size,
        layer_causal=layer_causal,
        readout=readout,
        seed=seed,
    )
    wrapped = wrap(model)
    require_raw_weights(wrapped, allow_processed=allow_processed)
    examples = _examples(wrapped, demos, template=template, loss=loss, prepend_bos=prepend_bos)
    schedule = list(_schedule(len(examples), settings))
    leaves = _leaves(wrapped, settings)
    parameters = [leaf for tensors in leaves.values() for leaf in tensors]
    stepper = optimizer(parameters, lr=settings.lr, **settings.optimizer_options)
    if any(group.get("weight_decay") for group in stepper.param_groups):
        raise OptionError(
            f"{settings.optimizer} has weight decay, which would pull the change of the weights towards 0, not the "
            "weights: set optimizer_options={'weight_decay': 0}."
        )
    losses: list[float] = []
    factors: list[StepFactors] = []
    for step, indices in enumerate(tqdm(schedule, desc="finetuning", unit="step", disable=None if progress else True)):
        batch = [examples[i] for i in indices]
        tape = Tape(wrapped, settings.projections, queries=keep_factors)
        value = _loss(wrapped, batch, leaves, settings, tape)
        losses.append(float(value.detach()))
        if not torch.isfinite(value):
            raise NonFiniteError(
                f"the loss became {losses[-1]} at step {step} of {len(schedule)} (lr {settings.lr:g}): try a smaller "
                "learning rate. The model is unchanged."
            )
        tape.backward(value)
        tape.write_gradients(leaves)
        stepper.step()
        if keep_factors:
            factors.append(tape.factors(batch))
    final: dict[str, Any] = {
        name: torch.stack([_heads_first(name, leaf) for leaf in tensors]) for name, tensors in leaves.items()
    }
    if not all(is_finite(tensor) for tensor in final.values()):
        raise NonFiniteError(
            f"the update became NaN or infinite by step {len(schedule) - 1} of {len(schedule)} (lr {settings.lr:g}): "
            "try a smaller learning rate. The model is unchanged."
        )
    return WeightUpdate(
        wrapped.info,
        **final,
        losses=tuple(losses),
        settings=settings,
        factors=tuple(factors) if keep_factors else None,
        trained_on=tuple(example.ids for example in examples),
    )


def require_raw_weights(model: LensModel, *, allow_processed: bool) -> None:
    """Raise `ModelMismatchError` for folded weights: finetuning and dW depend on the parametrisation."""
    if model.info.is_processed and not allow_processed:
        raise ModelMismatchError(
            f"{model.info.name} has {' and '.join(model.info.processing)}, which changes what finetuning does. Load it "
            "with from_pretrained_no_processing (or without enable_compatibility_mode), or pass allow_processed=True."
        )


def _examples(
    model: LensModel, demos: Any, *, template: Template | None, loss: Loss, prepend_bos: bool | None
) -> list[TrainingExample]:
    if isinstance(demos, str | Mapping):
        demos = as_prompt(demos)
    if not isinstance(demos, ICLPrompt) and demos and all(isinstance(d, str) for d in demos):
        return text_examples(model, demos, prepend_bos=prepend_bos)
    return training_examples(model, demos, template=template, loss=loss, prepend_bos=prepend_bos)


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
            if sorted(order) != list(range(n_examples)):
                raise OptionError(f"order must be a permutation of 0 to {n_examples - 1}, got {order}.")
        for start in range(0, n_examples, size):
            yield order[start : start + size]


def _leaves(model: LensModel, settings: FinetuneSettings) -> dict[str, list[Tensor]]:
    """Zero changes of every layer, with room for their gradients.

    Weights of q, k and v are ``[d_model, head, d_head]``: the matrices that x is multiplied with, uncopied.
    """
    info = model.info
    dtype = getattr(torch, info.dtype)
    dtype = torch.float32 if dtype in {torch.float16, torch.bfloat16} else dtype
    leaves: dict[str, list[Tensor]] = {}

    def zeros(*shape: int) -> list[Tensor]:
        found = [torch.zeros(shape, dtype=dtype, device=model.device) for _ in range(info.n_layers)]
        for leaf in found:
            leaf.grad = torch.zeros_like(leaf)
        return found

    for projection in settings.projections:
        heads = info.n_kv_heads if projection in "kv" else info.n_heads
        is_out = projection == "o"
        leaves[f"w_{projection}"] = (
            zeros(heads, info.d_head, info.d_model) if is_out else zeros(info.d_model, heads, info.d_head)
        )
        if settings.bias and all(model.has_bias(projection, layer) for layer in range(info.n_layers)):
            leaves[f"b_{projection}"] = zeros(info.d_model) if is_out else zeros(heads, info.d_head)
    return leaves


def _heads_first(name: str, leaf: Tensor) -> Tensor:
    """From the layout of `_leaves` to that of `WeightUpdate`."""
    return leaf.transpose(0, 1) if name in {"w_q", "w_k", "w_v"} else leaf


def _loss(
    model: LensModel,
    batch: list[TrainingExample],
    leaves: dict[str, list[Tensor]],
    settings: FinetuneSettings,
    tape: Tape,
) -> Tensor:
    hooks: list[Hook] = []
    for layer in range(model.info.n_layers):
        changes = {name: _heads_first(name, tensors[layer]) for name, tensors in leaves.items()}
        hooks += change_hooks(model, layer, changes, seen=tape.layer(layer))
        hooks += tape.query_hooks(layer)
    if settings.layer_causal:
        return layer_causal_losses(model, batch, hooks, settings.readout).sum()
    return ordinary_loss(model, batch, hooks)
