"""The finetuning update in the linear form: dW_FT of every head (docs/theory.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.decomposition import without_demos
from metaopt_lens.finetuning._update import WeightUpdate
from metaopt_lens.models import AttentionCall, AttentionModel, Hook, Prefix


@dataclass(frozen=True, eq=False)
class UpdatedMemory:
    """Keys and values of Z = S and Q before and after a weight update, at the in-context positions.

    ``dW_FT = sum_Z (v + dv) (x) (k + dk) - sum_Z v (x) k``. First-order in depth: the attention inputs x are those of
    the base model's zero-shot run.

    Attributes:
        k, v: of the base model; k_updated, v_updated: with ``x dW + db`` added before QK-norm and rotary.
    """

    k: Float[Tensor, "layer src kv_head d_head"]
    v: Float[Tensor, "layer src kv_head d_head"]
    k_updated: Float[Tensor, "layer src kv_head d_head"]
    v_updated: Float[Tensor, "layer src kv_head d_head"]


def updated_memory(
    model: AttentionModel,
    update: WeightUpdate,
    shared: Prefix,
    demos: TokenSpan,
    prefix_ids: Sequence[int],
    queries: Sequence[Sequence[int]],
) -> list[UpdatedMemory]:
    """Keys and values of the position-matched zero-shot run, with and without a weight update.

    Each query runs twice in one batch, as itself and as a twin whose keys and values get the update but whose head
    outputs are replaced by the first's: both then see the base model's residual stream.

    Args:
        shared: the base model's prefix S and D.
        demos: D, masked out at every position of the queries.
        prefix_ids: token ids of S.
        queries: token ids of the queries.
    """
    own = _twins(model, update, shared, queries, lambda call, n: without_demos(call, demos, slice(n)))
    before: list[UpdatedMemory] = []
    if prefix_ids:
        before = _twins(model, update, None, [prefix_ids], lambda call, n: call.z[:n])
    if not before:
        return own
    fields = ("k", "v", "k_updated", "v_updated")
    return [
        UpdatedMemory(**{name: torch.cat([getattr(before[0], name), getattr(memory, name)], dim=1) for name in fields})
        for memory in own
    ]


def _twins(
    model: AttentionModel,
    update: WeightUpdate,
    prefix: Prefix | None,
    sequences: Sequence[Sequence[int]],
    base_z: Callable[[AttentionCall, int], Tensor],
) -> list[UpdatedMemory]:
    n = len(sequences)
    tokens = torch.zeros(2 * n, max(len(s) for s in sequences), dtype=torch.long)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = tokens[n + row, : len(ids)] = torch.tensor(ids)
    offset = 0 if prefix is None else prefix.n_tokens
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def keep(call: AttentionCall) -> Tensor:
        keys.append(call.k[:, offset:])
        values.append(call.v[:, offset:])
        z = base_z(call, n)
        return torch.cat([z, z])

    hooks: list[Hook] = []
    for layer in range(model.info.n_layers):
        hooks += update.layer_hooks(model, layer, rows=slice(n, None), projections=("k", "v"))
        hooks += model.attention_hooks(layer, keep, prefix=prefix)
    model.run(tokens, hooks=hooks, prefix=prefix, stop_after_attention=True)
    k, v = (torch.stack([t.to(tensors[0].device) for t in tensors]) for tensors in (keys, values))
    return [
        UpdatedMemory(
            k=k[:, row, : len(ids)],
            v=v[:, row, : len(ids)],
            k_updated=k[:, n + row, : len(ids)],
            v_updated=v[:, n + row, : len(ids)],
        )
        for row, ids in enumerate(sequences)
    ]
