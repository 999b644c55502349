"""The finetuning update in the linear form: dW_FT of every head (docs/theory.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens.finetuning._update import WeightUpdate
from metaopt_lens.models import AttentionCall, Hook, LensModel, Prefix
from metaopt_lens.runs import Run, memory_of

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


@dataclass(frozen=True, eq=False)
class UpdatedMemory:
    """Keys and values of Z = S and Q before and after a weight update, at the in-context positions.

    ``dW_FT = sum_Z (v + dv) (x) (k + dk) - sum_Z v (x) k``. First-order in depth: the attention inputs x are those of
    the base model's zero-shot run.

    Attributes:
        k, v: of the base model.
        k_updated, v_updated: with ``x dW + db`` added before QK-norm and rotary.
    """

    k: Float[Tensor, "layer src kv_head d_head"]
    v: Float[Tensor, "layer src kv_head d_head"]
    k_updated: Float[Tensor, "layer src kv_head d_head"]
    v_updated: Float[Tensor, "layer src kv_head d_head"]


def updated_memory(model: LensModel, update: WeightUpdate, runs: Sequence[Run]) -> list[UpdatedMemory]:
    """Keys and values of the position-matched zero-shot run, with and without a weight update.

    Each query runs twice in one batch, as itself and as a twin whose keys and values get the update but whose head
    outputs are replaced by the first's: both then see the base model's residual stream.

    Args:
        model: a wrapped model.
        update: what finetuning did.
        runs: of the base model, of queries behind the same demonstrations, in context or position-matched.
    """
    tokens, demos = runs[0].tokens, runs[0].tokens.demonstrations
    queries = [run.tokens.ids[run.tokens.query.start :] for run in runs]

    def without_demos(call: AttentionCall, n: int) -> Tensor:
        return call.rows(slice(n)).attend(call.inside(demos))[0]

    own = _twins(model, update, runs[0].prefix, queries, without_demos)
    before: list[UpdatedMemory] = []
    if demos.start:
        before = _twins(model, update, None, [tokens.ids[: demos.start]], lambda call, n: call.z[:n])
    if not before:
        return own
    fields = ("k", "v", "k_updated", "v_updated")
    return [
        UpdatedMemory(**{name: torch.cat([getattr(before[0], name), getattr(memory, name)], dim=1) for name in fields})
        for memory in own
    ]


def delta_w_ft(memory: UpdatedMemory, layer: int, seen: Bool[Tensor, " src"]) -> FactoredMatrix:
    """``dW_FT = sum_Z (v + dv) (x) (k + dk) - v (x) k`` of every key-value head, factored; ``.AB @ q``.

    Written ``sum_Z dv (x) (k + dk) + v (x) dk``, in which nothing large cancels; rank at most ``min(d_head, 2 |Z|)``.

    Args:
        memory: keys and values of one query.
        layer: counted from 0.
        seen: which sources of Z the destination sees.
    """
    k, k_new, v, v_new = (t[layer][seen] for t in (memory.k, memory.k_updated, memory.v, memory.v_updated))
    keys, values = torch.cat([k_new, k_new - k]), torch.cat([v_new - v, v])
    return memory_of(keys, values, torch.ones(len(keys), dtype=torch.bool, device=keys.device))


def _twins(
    model: LensModel,
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
