"""Capture q, pattern and z at the positions asked for, and the queries' own keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import NonFiniteError
from metaopt_lens.dual import is_finite, softmax_with_sink
from metaopt_lens.extraction._guard import excess_over_parts, require_parts
from metaopt_lens.models import AttentionCall, AttentionModel, Hook, Prefix, active_momentum


@dataclass(frozen=True, eq=False)
class QueryCapture:
    """What one query's pass left behind, at the destinations asked for.

    Sources are the shared prefix followed by the query's own tokens.

    Attributes:
        q: query vectors as the scores see them; z: head outputs before W_O (after any edit).
        pattern: attention probabilities; sink: probability of the attention sink (0 without sinks).
        k, v: keys (as the scores see them) and values of the query's own tokens.
    """

    q: Float[Tensor, "dst layer head d_head"]
    pattern: Float[Tensor, "dst layer head src"]
    sink: Float[Tensor, "dst layer head"]
    z: Float[Tensor, "dst layer head d_head"]
    k: Float[Tensor, "layer pos kv_head d_head"]
    v: Float[Tensor, "layer pos kv_head d_head"]


def run_shared_prefix(model: AttentionModel, ids: Sequence[int], *, grad: bool = False) -> Prefix | None:
    """Run tokens that many prompts begin with, once; None if there are none.

    Raises:
        NonFiniteError: keys or values are NaN or infinite; names the first such layer.
    """
    if not ids:
        return None
    prefix = model.run_prefix(torch.tensor(ids), grad=grad)
    for layer, (k, v) in enumerate(zip(prefix.k, prefix.v, strict=True)):
        _require_finite(model, layer, keys=k, values=v)
    return prefix


def capture_queries(
    model: AttentionModel,
    prefix: Prefix | None,
    queries: Sequence[Sequence[int]],
    destinations: Sequence[Sequence[int]],
    *,
    edit: Callable[[AttentionCall], Tensor | None] | None = None,
    grad: bool = False,
) -> list[QueryCapture]:
    """Run queries together behind a shared prefix, ending after the last layer's attention.

    z is checked against its parts at the destinations (docs/theory.md, section 2): zero-shot part, meta-gradient and
    momentum add up to it, to the rounding of its dtype.

    Args:
        model: a wrapped model.
        prefix: what all queries stand behind; None for nothing.
        queries: token ids of each query; shorter ones are padded on the right, where nothing sees it.
        destinations: for each query, the positions in it to keep (counted from its first token).
        edit: called with every layer's `AttentionCall` before W_O; what it returns replaces z. Edits are made of
            scores, so the host's pattern is checked against them too.
        grad: keep the graph.

    Returns:
        A `QueryCapture` for each query.

    Raises:
        UnsupportedModelError: z is not the sum of its parts (a hook changes it); names the head.
        NonFiniteError: activations at the destinations are NaN or infinite; names the first such layer.
    """
    width = max(len(query) for query in queries)
    tokens = torch.zeros(len(queries), width, dtype=torch.long)
    for row, query in enumerate(queries):
        tokens[row, : len(query)] = torch.tensor(query)
    offset = 0 if prefix is None else prefix.n_tokens
    layers: list[Sequence[tuple[Tensor, ...]]] = []  # [layer][query] -> q, pattern, sink, z, k, v
    excess: list[Tensor] = []  # of every layer: how far heads are from their parts
    eta = active_momentum(model)

    def keep(call: AttentionCall) -> Tensor | None:
        edited = edit(call) if edit is not None else None
        z = call.z if edited is None else edited
        whole, sink = call.pattern, None
        # float16 has no room for small probabilities (below 6e-5 it loses digits, below 6e-8 everything).
        too_coarse = whole.dtype == torch.float16
        if too_coarse or call.rule.sinks is not None:
            rebuilt, sink = softmax_with_sink(call.scores(), call.rule.sinks)
            whole = rebuilt if too_coarse else whole
        rows = []
        found = []
        for row, query in enumerate(queries):
            at = torch.as_tensor(destinations[row], device=z.device)
            n_src = offset + len(query)
            pattern = whole[row][:, at, :n_src]
            own = slice(offset, n_src)
            momentum = None if eta is None else eta[call.layer]
            found.append(excess_over_parts(model, call, row, at, pattern, momentum, with_pattern=edit is not None))
            # Copies (indexing with `at` makes one), so that nothing keeps the whole batch's tensors alive.
            rows.append(
                (
                    call.q[row, at],
                    pattern.transpose(0, 1),
                    torch.zeros_like(pattern[..., 0]).T if sink is None else sink[row][:, at].T,
                    z[row, at],
                    call.k[row, own].clone(),
                    call.v[row, own].clone(),
                )
            )
        layers.append(rows)
        excess.append(torch.stack(found).amax(0))
        return edited

    hooks: list[Hook] = []
    for layer in range(model.info.n_layers):
        hooks += model.attention_hooks(layer, keep, prefix=prefix)
    model.run(tokens, hooks=hooks, prefix=prefix, stop_after_attention=True, grad=grad)
    for layer, of_queries in enumerate(layers):
        for own_q, _, _, own_z, own_k, own_v in of_queries:
            _require_finite(model, layer, queries=own_q, keys=own_k, values=own_v, outputs=own_z)
        require_parts(model, layer, excess[layer])
    captures = []
    for row in range(len(queries)):
        q, pattern, sink, z, k, v = zip(*(rows[row] for rows in layers), strict=True)
        captures.append(
            QueryCapture(
                q=_stack(q, 1),
                pattern=_stack(pattern, 1),
                sink=_stack(sink, 1),
                z=_stack(z, 1),
                k=_stack(k, 0),
                v=_stack(v, 0),
            )
        )
    return captures


def _stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Stack layers on the first one's device (layers may live on several)."""
    return torch.stack([t.to(tensors[0].device) for t in tensors], dim=dim)


def _require_finite(model: AttentionModel, layer: int, **tensors: Tensor) -> None:
    for what, tensor in tensors.items():
        if not is_finite(tensor):
            raise NonFiniteError(
                f"{model.info.name}: the {what} of layer {layer} hold NaN or infinity on this prompt "
                f"(dtype {model.info.dtype}). In half precision, load the model in float32 or bfloat16."
            )
