"""The finetuning update in the linear form: dW_FT of every head (docs/theory.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt_lens._errors import OptionError
from metaopt_lens.finetuning._update import WeightUpdate
from metaopt_lens.models import LensModel, Prefix, Start
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

    Computed layer by layer from the residual stream that entered the layer in the base model's run; nothing else of the
    layer is run.

    Args:
        model: a wrapped model.
        update: what finetuning did.
        runs: position-matched runs of the base model, of queries behind the same demonstrations, recorded with
            ``Keep(own_stream=True)``.

    Raises:
        OptionError: runs recorded without their residual stream.
    """
    tokens = runs[0].tokens
    streams: list[Tensor] = []
    for run in runs:
        if run.own_stream is None:
            raise OptionError("these runs kept no residual stream: record 'zs_matched' with Keep(own_stream=True).")
        streams.append(run.own_stream)
    queries = [run.tokens.ids[run.tokens.query.start :] for run in runs]
    own = _both(model, update, queries, streams, runs[0].prefix)
    ids = tokens.ids[: tokens.demonstrations.start]
    if not ids:
        return own
    (before,) = _both(model, update, [ids], [_stream_of(model, ids)], None)
    names = [field.name for field in fields(UpdatedMemory)]
    return [
        UpdatedMemory(**{name: torch.cat([getattr(before, name), getattr(memory, name)], dim=1) for name in names})
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


def _both(
    model: LensModel,
    update: WeightUpdate,
    sequences: Sequence[Sequence[int]],
    streams: Sequence[Float[Tensor, "layer _ d_model"]],
    prefix: Prefix | None,
) -> list[UpdatedMemory]:
    """Sequences behind a prefix, given what enters every layer; each stands twice in the batch, once updated."""
    n = len(sequences)
    tokens = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    found = []
    for layer in range(model.info.n_layers):
        entering = pad_sequence([stream[layer] for stream in streams], batch_first=True)
        start = Start(layer, torch.cat([entering, entering]))
        hooks = update.layer_hooks(model, layer, rows=slice(n, None), projections=("k", "v"))
        found.append(model.keys_and_values(torch.cat([tokens, tokens]), start=start, prefix=prefix, hooks=hooks))
    k, v = (torch.stack([t.to(found[0][0].device) for t in layers], 1) for layers in zip(*found, strict=True))
    return [
        UpdatedMemory(
            k=k[row, :, : len(ids)],
            v=v[row, :, : len(ids)],
            k_updated=k[n + row, :, : len(ids)],
            v_updated=v[n + row, :, : len(ids)],
        )
        for row, ids in enumerate(sequences)
    ]


def _stream_of(model: LensModel, ids: Sequence[int]) -> Float[Tensor, "layer pos d_model"]:
    """The residual stream before every block."""
    streams: list[Tensor] = []
    hooks = [(model.residual_hook("pre", layer), streams.append) for layer in range(model.info.n_layers)]
    model.run(torch.tensor(ids)[None], hooks=hooks, stop_after_attention=True)
    return torch.stack([t[0].to(streams[0].device) for t in streams])
