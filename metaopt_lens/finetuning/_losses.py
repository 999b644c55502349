"""The losses of explicit finetuning: ordinary cross-entropy, and the layer-causal sum of early-exit losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.finetuning._examples import TrainingExample
from metaopt_lens.finetuning._settings import Readout
from metaopt_lens.models import Hook, LensModel


def batch_tokens(examples: Sequence[TrainingExample]) -> Tensor:
    """Token ids ``[batch, pos]``, padded on the right."""
    tokens = torch.zeros(len(examples), max(len(e.ids) for e in examples), dtype=torch.long)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = torch.tensor(example.ids)
    return tokens


def cross_entropy(logits: Float[Tensor, "batch pos d_vocab"], examples: Sequence[TrainingExample]) -> Float[Tensor, ""]:
    """Mean over examples of the mean next-token cross-entropy over each example's targets."""
    losses = []
    for row, example in enumerate(examples):
        at = torch.tensor(example.targets, device=logits.device)
        gold = torch.tensor(example.ids, device=logits.device)[at]
        predicted = logits[row, at - 1]
        predicted = predicted.float() if predicted.dtype in {torch.float16, torch.bfloat16} else predicted
        losses.append(torch.nn.functional.cross_entropy(predicted, gold))
    return torch.stack(losses).mean()


def ordinary_loss(model: LensModel, examples: Sequence[TrainingExample], hooks: Sequence[Hook]) -> Tensor:
    """Cross-entropy of the model's own logits, with graph."""
    logits = model.run(batch_tokens(examples), hooks=hooks, grad=True)
    assert logits is not None
    return cross_entropy(logits, examples)


def layer_causal_losses(
    model: LensModel, examples: Sequence[TrainingExample], hooks: Sequence[Hook], readout: Readout
) -> Float[Tensor, " layer"]:
    """Every layer's own early-exit cross-entropy (LCGD, arXiv:2311.07772).

    Each block's input is detached, so a layer's loss has zero gradient for every other layer. What is read out goes
    through the frozen final norm and unembedding.

    Raises:
        UnsupportedModelError: the early exit of the last block is not the model's own logits.
    """
    read: dict[int, Tensor] = {}

    def cut(tensor: Tensor) -> Tensor:
        return tensor.detach()

    def keep(store: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
        def use(tensor: Tensor) -> None:
            store[layer] = tensor

        return use

    cuts: list[Hook] = []
    reads: list[Hook] = []
    last: dict[int, Tensor] = {}
    n_layers = model.info.n_layers
    for layer in range(n_layers):
        cuts.append((model.residual_hook("pre", layer), cut))
        name = model.residual_hook("post", layer) if readout == "block" else model.hook_name("attn_out", layer)
        reads.append((name, keep(read, layer)))
    reads.append((model.residual_hook("post", n_layers - 1), keep(last, n_layers - 1)))
    # What is read out must hold the change that `hooks` make at the same place, and what they see must be cut off.
    logits = model.run(batch_tokens(examples), hooks=[*cuts, *hooks, *reads], grad=True)
    assert logits is not None
    with torch.no_grad():
        exit_logits = model.early_exit(last[n_layers - 1])
        error = (exit_logits - logits).abs().max() / logits.abs().max().clamp_min(1e-30)
    if error > 1e-2:
        raise UnsupportedModelError(
            f"layer-causal finetuning reads layers out through the final norm and the unembedding, but for "
            f"{model.info.name} ({model.info.architecture}) that misses its own logits by {error:.1e} (relative)."
        )
    return torch.stack([cross_entropy(model.early_exit(read[layer]), examples) for layer in range(n_layers)])
