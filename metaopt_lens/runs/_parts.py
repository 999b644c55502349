"""The split of a run: both forms, the matrices, and the moving average (docs/theory.md, sections 2 and 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import (
    LinearParts,
    SoftmaxParts,
    linear_memory,
    linear_weights,
    momentum_weights,
    split_linear,
    split_softmax,
    weighted_values,
)
from metaopt_lens.runs._prompt_run import Run

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix

_TOGETHER = 8  # layers


def softmax_parts(run: Run) -> SoftmaxParts:
    """The exact split: ``zero_shot + meta_gradient = z`` (less the moving average), ``[dst, layer, head, d_head]``.

    `SoftmaxParts.without_demos` is ``z_without``: the same head with D masked out, q, k and v unchanged.

    Args:
        run: an in-context run; in a run without D the meta-gradient is 0.
    """
    pattern, sink = run.pattern.permute(1, 2, 0, 3), run.sink.permute(1, 2, 0)  # layer head dst src
    parts = [
        split_softmax(pattern[some], _stacked(run.v_of, some), run.tokens.demonstrations, sink=sink[some])
        for some in _chunks(run)
    ]  # each [layer, dst, head, d_head]
    names = [f.name for f in dataclasses.fields(SoftmaxParts)]
    return SoftmaxParts(**{name: torch.cat([getattr(p, name) for p in parts]).transpose(0, 1) for name in names})


def linear_parts(run: Run) -> LinearParts:
    """The relaxed form, ``W_ZSL q`` and ``dW_ICL q`` (arXiv:2212.10559, eq. 7-10), ``[dst, layer, head, d_head]``.

    Args:
        run: an in-context run.
    """
    q, visible, demos = run.q.transpose(0, 1), run.visible, run.tokens.demonstrations
    parts = [
        split_linear(q[some], _stacked(run.k_of, some), _stacked(run.v_of, some), visible[some], demos)
        for some in _chunks(run)
    ]
    return LinearParts(
        zero_shot=torch.cat([p.zero_shot for p in parts]).transpose(0, 1),
        meta_gradient=torch.cat([p.meta_gradient for p in parts]).transpose(0, 1),
    )


def _chunks(run: Run) -> list[slice]:
    """A few layers at a time: fewer steps than one by one, and little memory."""
    return [slice(i, min(i + _TOGETHER, len(run.own_k))) for i in range(0, len(run.own_k), _TOGETHER)]


def _stacked(of: Callable[[int], Tensor], layers: slice) -> Float[Tensor, "layer src kv_head d_head"]:
    """Keys or values of some layers, on the first one's device."""
    found = [of(layer) for layer in range(layers.start, layers.stop)]
    return torch.stack([t.to(found[0].device) for t in found])


def softmax_weights(run: Run, layer: int) -> Float[Tensor, "head dst src"]:
    """The exact form's weights: the attention pattern of a layer."""
    return rearrange(run.pattern[:, layer], "dst head src -> head dst src")


def run_linear_weights(run: Run, layer: int) -> Float[Tensor, "head dst src"]:
    """The relaxed form's weights ``k_i . q``: no softmax, no scale."""
    return linear_weights(run.q[:, layer], run.k_of(layer), run.visible[layer])


def part_of(run: Run, weights: Callable[[Run, int], Tensor], span: TokenSpan) -> Float[Tensor, "dst layer head d_head"]:
    """What a span of sources contributes to every head.

    Args:
        run: any run.
        weights: `softmax_weights` or `run_linear_weights`.
        span: positions in the run's prompt.
    """
    parts = [weighted_values(weights(run, i)[..., span.slice], run.v_of(i)[span.slice]) for i in range(len(run.own_v))]
    return torch.stack(parts, dim=1)


# ---- the matrices ---------------------------------------------------------------------------------------------------


def w_zsl(run: Run, layer: int, *, dst: int = -1) -> FactoredMatrix:
    """``W_ZSL = sum_{i in Z} v_i (x) k_i`` over the visible tokens of Z, of every key-value head; ``.AB @ q``.

    Args:
        run: an in-context run.
        layer: counted from 0.
        dst: which destination's visible tokens, by index.
    """
    return memory_of(run.k_of(layer), run.v_of(layer), run.visible[layer, dst] & ~run.in_demos)


def delta_w_icl(run: Run, layer: int, *, dst: int = -1) -> FactoredMatrix:
    """``dW_ICL = sum_{i in D} v_i (x) k_i`` over the visible tokens of D, of every key-value head; ``.AB @ q``.

    Args:
        run: an in-context run.
        layer: counted from 0.
        dst: which destination's visible tokens, by index.
    """
    return memory_of(run.k_of(layer), run.v_of(layer), run.visible[layer, dst] & run.in_demos)


def memory_of(
    k: Float[Tensor, "src kv_head d_head"], v: Float[Tensor, "src kv_head d_head"], chosen: Bool[Tensor, " src"]
) -> FactoredMatrix:
    """``sum_i v_i (x) k_i`` over the chosen sources, factored, ``[kv_head, d_head, d_head]``.

    Args:
        k: keys as the scores see them.
        v: values.
        chosen: which sources.
    """
    return linear_memory(k[chosen].transpose(0, 1), v[chosen].transpose(0, 1))


# ---- momentum -------------------------------------------------------------------------------------------------------


def momentum_part(run: Run, span: TokenSpan) -> Float[Tensor, "dst layer head d_head"]:
    """A span's share of the moving average, ``sum_{i in span, i < t} eta^(t-i) v_i``; 0 without momentum attention.

    Args:
        run: any run.
        span: positions in the run's prompt; all of them for the average itself.
    """
    if run.eta is None:
        like = torch.promote_types(run.z.dtype, torch.float32)
        return torch.zeros((), dtype=like, device=run.z.device).expand_as(run.z)  # a view: costs no memory
    eta = run.eta.to(run.z.device, torch.promote_types(run.z.dtype, torch.float32))
    dst = torch.tensor(run.destinations, device=eta.device)
    src = torch.arange(span.start, span.stop, device=eta.device)
    parts = [
        weighted_values(momentum_weights(eta[i], dst, src), run.v_of(i)[span.slice]) for i in range(len(run.own_v))
    ]
    return torch.stack(parts, dim=1)
