"""The losses of explicit finetuning: ordinary cross-entropy, and the layer-causal sum of early-exit losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.finetuning._examples import TrainingExample
from metaopt_lens.finetuning._settings import Readout as ReadoutPlace
from metaopt_lens.models import Hook, LensModel, Readout


def batch_tokens(examples: Sequence[TrainingExample]) -> Tensor:
    """Token ids ``[batch, pos]``, padded on the right."""
    tokens = torch.zeros(len(examples), max(len(e.ids) for e in examples), dtype=torch.long)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = torch.tensor(example.ids)
    return tokens


def predicting(examples: Sequence[TrainingExample]) -> Int[Tensor, "batch chosen"]:
    """Positions whose logits predict the targets; shorter rows repeat their last."""
    rows = [[target - 1 for target in example.targets] for example in examples]
    longest = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])


def cross_entropy(
    logits: Float[Tensor, "batch chosen d_vocab"], examples: Sequence[TrainingExample]
) -> Float[Tensor, ""]:
    """Mean over examples of the mean next-token cross-entropy over each example's targets.

    Args:
        logits: at the positions of `predicting`.
        examples: what is learned.
    """
    losses = []
    for row, example in enumerate(examples):
        gold = torch.tensor([example.ids[target] for target in example.targets], device=logits.device)
        predicted = logits[row, : len(gold)]
        predicted = predicted.float() if predicted.dtype in {torch.float16, torch.bfloat16} else predicted
        losses.append(torch.nn.functional.cross_entropy(predicted, gold))
    return torch.stack(losses).mean()


def ordinary_loss(model: LensModel, examples: Sequence[TrainingExample], hooks: Sequence[Hook]) -> Tensor:
    """Cross-entropy of the model's own logits, with graph."""
    logits = model.run(batch_tokens(examples), hooks=hooks, read=Readout(predicting(examples)), grad=True)
    assert logits is not None
    return cross_entropy(logits, examples)


def layer_causal_losses(
    model: LensModel, examples: Sequence[TrainingExample], hooks: Sequence[Hook], what: ReadoutPlace
) -> Float[Tensor, " layer"]:
    """Every layer's own early-exit cross-entropy (LCGD, arXiv:2311.07772).

    Each block's input is detached, so a layer's loss has zero gradient for every other layer. What is read out goes
    through the frozen final norm and unembedding, one layer at a time.

    Args:
        model: the base.
        examples: what is learned.
        hooks: the changes so far.
        what: is read out: the ``"block"`` output or the ``"attention"`` output.

    Raises:
        UnsupportedModelError: the early exit of the last block is not the model's own logits.
    """
    read = Readout(predicting(examples))
    losses: dict[int, Tensor] = {}
    last: list[Tensor] = []
    top = model.info.n_layers - 1

    def cut(tensor: Tensor) -> Tensor:
        return tensor.detach()

    def exit_at(layer: int) -> Callable[[Tensor], None]:
        def use(tensor: Tensor) -> None:
            losses[layer] = _exit_loss(model, read.rows(tensor), examples)

        return use

    cuts: list[Hook] = [(model.residual_hook("pre", layer), cut) for layer in range(top + 1)]
    kind = "resid_post" if what == "block" else "attn_out"
    exits: list[Hook] = [
        (model.hook_name(kind, layer), exit_at(layer)) for layer in range(top if what == "block" else top + 1)
    ]
    exits.append((model.residual_hook("post", top), last.append))
    # What is read out must hold the change that `hooks` make at the same place, and what they see must be cut off.
    logits = model.run(batch_tokens(examples), hooks=[*cuts, *hooks, *exits], read=read, grad=True)
    assert logits is not None
    _require_own_logits(model, read.rows(last[0]), logits)
    if what == "block":
        losses[top] = cross_entropy(logits, examples)
    return torch.stack([losses[layer].to(logits.device) for layer in range(top + 1)])


def _exit_loss(
    model: LensModel, stream: Float[Tensor, "batch chosen d_model"], examples: Sequence[TrainingExample]
) -> Float[Tensor, ""]:
    """Cross-entropy of an early exit. Its gradient is found at once, so that no layer's logits outlive this call."""
    leaf = stream.detach().requires_grad_()
    value = cross_entropy(model.early_exit(leaf), examples)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach() + ((stream - stream.detach()) * gradient).sum()


def _require_own_logits(model: LensModel, stream: Tensor, logits: Tensor) -> None:
    """Require that the last block's early exit gives the model's own logits."""
    if model.tried.exits:  # then that is where they come from
        return
    with torch.no_grad():
        error = (model.early_exit(stream) - logits).abs().max() / logits.abs().max().clamp_min(1e-30)
    if error > 1e-2:
        raise UnsupportedModelError(
            f"layer-causal finetuning reads layers out through the final norm and the unembedding, but for "
            f"{model.info.name} ({model.info.architecture}) that misses its own logits by {error:.1e} (relative)."
        )
