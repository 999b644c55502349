"""Attention scores as a model computes them, from queries and keys as the scores see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens.dual._weighted import at_least_float32, weighted_values


@dataclass(frozen=True)
class ScoreRule:
    """How one layer turns ``q . k`` into scores: everything but the queries and keys themselves.

    Attributes:
        scale: factor on ``q . k`` (usually ``d_head ** -0.5``).
        softcap: ``c`` in ``c tanh(score / c)`` (Gemma-2), applied after the scale.
        window: a query at position j sees only keys at ``i > j - window`` (sliding window).
        alibi_slopes: per head, the score falls by slope times distance (BLOOM, MPT).
        sinks: per head, the logit of a sink that takes part in the softmax and has no value (GPT-OSS).
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    alibi_slopes: Float[Tensor, " head"] | None = None
    sinks: Float[Tensor, " head"] | None = None


def visible_sources(
    rule: ScoreRule, dst_positions: Int[Tensor, "*rows dst"], src_positions: Int[Tensor, "*rows src"]
) -> Bool[Tensor, "*rows dst src"]:
    """Which sources each destination may attend to: causal, and inside the sliding window if there is one.

    Args:
        rule: the layer's score rule.
        dst_positions: positions of the destinations, as the model counted them.
        src_positions: positions of the sources, as the model counted them.
    """
    distance = dst_positions[..., :, None] - src_positions[..., None, :]
    visible = distance >= 0
    return visible if rule.window is None else visible & (distance < rule.window)


def attention_scores(
    rule: ScoreRule,
    q: Float[Tensor, "*batch dst head d_head"],
    k: Float[Tensor, "*batch src kv_head d_head"],
    *,
    dst_positions: Int[Tensor, "*rows dst"],
    src_positions: Int[Tensor, "*rows src"],
) -> Float[Tensor, "*batch head dst src"]:
    """Final scores before the softmax: scaled, soft-capped, with ALiBi bias, ``-inf`` where not visible.

    Positions are those the model saw (in-context indices), the same for the whole batch or one row for each sequence;
    rotary rotation is already in `q` and `k`.
    Computed in float32 at least.

    Args:
        rule: the layer's score rule: scale, soft-cap, ALiBi slopes, window.
        q: query vectors, rotated already.
        k: keys of all sources, rotated already.
        dst_positions: positions of the destinations, as the model counted them; one row for all sequences or one for
            each.
        src_positions: positions of the sources, likewise.
    """
    query = rearrange(at_least_float32(q), "... dst (kv group) d -> ... kv group dst d", kv=k.shape[-2])
    key = rearrange(at_least_float32(k), "... src kv d -> ... kv 1 d src")
    scores = rearrange(query @ key, "... kv group dst src -> ... (kv group) dst src") * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.alibi_slopes is not None:
        distance = (dst_positions[..., :, None] - src_positions[..., None, :]).to(scores.dtype)[..., None, :, :]
        scores = scores - rule.alibi_slopes.to(scores)[:, None, None] * distance
    visible = visible_sources(rule, dst_positions, src_positions)[..., None, :, :]
    return scores.masked_fill(~visible, -torch.inf)


def softmax_with_sink(
    scores: Float[Tensor, "*batch head dst src"], sinks: Float[Tensor, " head"] | None
) -> tuple[Float[Tensor, "*batch head dst src"], Float[Tensor, "*batch head dst"]]:
    """The attention pattern, and the probability that goes to the sink (0 without sinks).

    Args:
        scores: final scores, ``-inf`` where not visible.
        sinks: the layer's sink logits; None without sinks.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1), torch.zeros_like(scores[..., 0])
    column = sinks.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)
    return weights[..., :-1], weights[..., -1]


def attend(
    scores: Float[Tensor, "*batch head dst src"],
    values: Float[Tensor, "*batch src kv_head d_head"],
    *,
    sinks: Float[Tensor, " head"] | None = None,
    hidden: Bool[Tensor, "*hidden src"] | None = None,
) -> tuple[
    Float[Tensor, "*batch dst head d_head"], Float[Tensor, "*batch head dst src"], Float[Tensor, "*batch head dst"]
]:
    """The heads' outputs under these scores, with some sources hidden: ``z_without``, q, k and v unchanged.

    Args:
        scores: final scores, ``-inf`` where not visible.
        values: values of all sources.
        sinks: the layer's sink logits; None without sinks.
        hidden: sources to hide, broadcast against `scores`; None hides nothing.

    Returns:
        z, the pattern, and what goes to the sink, in float32 at least.
    """
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    pattern, sink = softmax_with_sink(scores, sinks)
    return weighted_values(pattern, values), pattern, sink
