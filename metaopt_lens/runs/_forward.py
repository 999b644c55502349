"""Forward passes: what prompts share, run once, and many queries behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt_lens.models import Hook, LensModel, Prefix
from metaopt_lens.runs._keep import ATTENTION, Keep, Row
from metaopt_lens.runs._prompt_run import Run
from metaopt_lens.runs._seen_batch import SeenBatch, require_finite


def run_shared_prefix(
    model: LensModel, ids: Sequence[int], *, hooks: Sequence[Hook] = (), grad: bool = False
) -> Prefix | None:
    """Run tokens that many prompts begin with, once; None if there are none.

    Args:
        model: a wrapped model.
        ids: token ids of S, or of S and D.
        hooks: attached to this pass.
        grad: keep the graph.

    Raises:
        NonFiniteError: keys or values are NaN or infinite; names the first such layer.
    """
    if not ids:
        return None
    prefix = model.run_prefix(torch.tensor(ids), hooks=hooks, grad=grad)
    for layer, (k, v) in enumerate(zip(prefix.k, prefix.v, strict=True)):
        require_finite(model, layer, keys=k, values=v)
    own_k, own_v = tuple(map(_own, prefix.k)), tuple(map(_own, prefix.v))
    return Prefix(k=own_k, v=own_v, host_k=own_k if prefix.host_k is prefix.k else tuple(map(_own, prefix.host_k)))


def run_rows(
    model: LensModel, prefix: Prefix | None, rows: Sequence[Row], *, keep: Keep = ATTENTION, grad: bool = False
) -> list[Run]:
    """Run queries together behind one prefix. The pass ends where nothing more is kept.

    The position-matched run is the in-context run with D hidden from Q at every position and in every layer
    (docs/theory.md, section 5): it rides in the same batch, so weights are read once. Under momentum attention D's
    share of the moving average is hidden too.

    Args:
        model: a wrapped model.
        prefix: keys and values of what stands before all queries; None for nothing.
        rows: position-matched ones last; queries are padded on the right, where nothing sees it.
        keep: what to keep beyond the attention.
        grad: keep the graph.

    Raises:
        NonFiniteError: activations at the destinations are NaN or infinite; names the first such layer.
        UnsupportedModelError: z is not the sum of its parts (a hook changes it); names the head.
    """
    batch = SeenBatch(model, prefix, rows, keep)
    hooks: list[Hook] = []
    for layer in range(model.info.n_layers):
        hooks += batch.hooks(layer)
    logits = model.run(
        batch.ids,
        hooks=hooks,
        prefix=prefix,
        read=batch.readout if keep.logits else None,
        stop_after_attention=not keep.whole_pass,
        stop_after_blocks=keep.whole_pass and not keep.logits,
        grad=grad,
    )
    return batch.runs(logits)


def _own(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: what a fused projection shows is a view of queries, keys and values."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
