"""finetune(): gradient descent on a frozen base (docs/theory.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from metaopt_lens._errors import ModelMismatchError
from metaopt_lens.finetuning._descent import Descent
from metaopt_lens.finetuning._examples import TrainingExample, text_examples, training_examples
from metaopt_lens.finetuning._settings import FinetuneSettings, Loss, Order, Projection, Readout
from metaopt_lens.finetuning._update import WeightUpdate
from metaopt_lens.models import LensModel, wrap
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
        lr: learning rate (see `choose_learning_rate`).
        epochs: passes over the demonstrations.
        projections: which of ``"q"``, ``"k"``, ``"v"``, ``"o"``, ``"mlp_in"``, ``"mlp_gate"``, ``"mlp_out"`` are
            updated, in every layer.
        bias: also update their biases, where the model has them.
        optimizer: a class of ``torch.optim``.
        optimizer_options: its further arguments.
        loss: ``"all"`` predicted tokens of a demonstration, or those of its ``"label"`` only.
        order: ``"given"``, ``"reversed"``, ``"shuffled"`` (reshuffled every epoch), or a permutation.
        batch_size: demonstrations per step; None for all.
        layer_causal: every layer learns from its own early-exit loss only (arXiv:2311.07772).
        readout: what that loss reads: the ``"block"`` output or the ``"attention"`` output.
        seed: of ``order="shuffled"``.
        template: the text around input and label; the prompt's own for an `ICLPrompt`.
        prepend_bos: put BOS first; None for the model's default.
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
    made = prepare(
        model,
        demos,
        template=template,
        prepend_bos=prepend_bos,
        allow_processed=allow_processed,
        optimizer=optimizer,
        lr=lr,
        epochs=epochs,
        projections=projections,
        bias=bias,
        optimizer_options=optimizer_options,
        loss=loss,
        order=order,
        batch_size=batch_size,
        layer_causal=layer_causal,
        readout=readout,
        seed=seed,
    )
    return made.run(keep_factors=keep_factors, progress=progress)


def prepare(
    model: Any,
    demos: PromptLike | Sequence[Demo | tuple[str, str]] | Sequence[str],
    *,
    template: Template | None,
    prepend_bos: bool | None,
    allow_processed: bool = False,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **given: Any,
) -> Descent:
    """A finetuning that is ready to run: arguments checked, model wrapped, demonstrations tokenised.

    Args:
        model: see `finetune`.
        demos: see `finetune`.
        template: see `finetune`.
        prepend_bos: see `finetune`.
        allow_processed: see `finetune`.
        optimizer: see `finetune`.
        given: fields of `FinetuneSettings`.
    """
    settings = make_settings(optimizer, **given)
    wrapped = wrap(model)
    require_raw_weights(wrapped, allow_processed=allow_processed)
    examples = _examples(wrapped, demos, template=template, loss=settings.loss, prepend_bos=prepend_bos)
    return Descent(wrapped, examples, settings, optimizer)


def make_settings(
    optimizer: Callable[..., torch.optim.Optimizer],
    *,
    lr: float,
    optimizer_options: dict[str, Any] | None = None,
    projections: Sequence[Projection] = ("k", "v"),
    order: Order = "given",
    **others: Any,
) -> FinetuneSettings:
    """What `finetune` was given, as a value that can be stored."""
    return FinetuneSettings(
        lr=float(lr),
        optimizer=getattr(optimizer, "__name__", repr(optimizer)),
        optimizer_options=dict(optimizer_options or {}),
        projections=tuple(projections),
        order=order if isinstance(order, str) else tuple(order),
        **others,
    )


def require_raw_weights(model: LensModel, *, allow_processed: bool) -> None:
    """Raise `ModelMismatchError` for folded weights: finetuning and dW depend on the parametrisation.

    Args:
        model: a wrapped model.
        allow_processed: raise nothing.
    """
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
