"""The exact softmax form of the split, and its inverse, the merge (docs/theory.md, sections 2 and 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual._weighted import at_least_float32, split_sources


@dataclass(frozen=True, eq=False)
class SoftmaxParts:
    """Exact split of a head's output: ``z = zero_shot + meta_gradient``.

    Attributes:
        zero_shot: ``sum_{i in Z} a_ji v_i``.
        meta_gradient: ``sum_{i in D} a_ji v_i``.
        mass: attention mass alpha on the demonstrations.
        remaining: attention mass on everything else, the sink included.
        without_demos: ``zero_shot / remaining``: the same head with the demonstrations masked out.
    """

    zero_shot: Float[Tensor, "*batch head d_head"]
    meta_gradient: Float[Tensor, "*batch head d_head"]
    mass: Float[Tensor, "*batch head"]
    remaining: Float[Tensor, "*batch head"]
    without_demos: Float[Tensor, "*batch head d_head"]

    @property
    def z(self) -> Float[Tensor, "*batch head d_head"]:
        """The head's output before W_O."""
        return self.zero_shot + self.meta_gradient

    @property
    def update(self) -> Float[Tensor, "*batch head d_head"]:
        """``z - without_demos``, the direct effect; 0 where no demonstration is visible."""
        return torch.where(self.mass[..., None] == 0, 0.0, self.z - self.without_demos)


def split_softmax(
    pattern: Float[Tensor, "*batch head dst src"],
    values: Float[Tensor, "*batch src kv_head d_head"],
    demos: TokenSpan,
    *,
    sink: Float[Tensor, "*batch head dst"] | None = None,
) -> SoftmaxParts:
    """Split every head's output at every destination into its zero-shot and its meta-gradient part.

    `remaining` is summed, never 1 - alpha: in float32 the subtraction loses everything near alpha = 1.

    Args:
        pattern: attention probabilities, as the model used them.
        values: values of all sources.
        demos: the demonstrations' source positions.
        sink: probability of the attention sink, from the model's own sink logit; None without sinks.

    Returns:
        `SoftmaxParts` with shapes ``[*batch, dst, head, d_head]`` and ``[*batch, dst, head]``.

    Raises:
        SpanError: the demonstrations reach past the last source position.
    """
    zero_shot, meta_gradient = split_sources(pattern, values, demos)
    weights = at_least_float32(pattern)
    mass = weights[..., demos.slice].sum(-1)
    remaining = weights[..., : demos.start].sum(-1) + weights[..., demos.stop :].sum(-1)
    if sink is not None:
        remaining = remaining + at_least_float32(sink)
    remaining = remaining.mT
    return SoftmaxParts(
        zero_shot=zero_shot,
        meta_gradient=meta_gradient,
        mass=mass.mT,
        remaining=remaining,
        without_demos=zero_shot / remaining[..., None],
    )


def merge_softmax(
    z_rest: Float[Tensor, "*batch d_head"],
    lse_rest: Float[Tensor, "*batch"],
    z_demos: Float[Tensor, "*batch d_head"],
    lse_demos: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch d_head"]:
    """Join two softmaxes over disjoint sources into the softmax over both (docs/theory.md, section 5).

    ``alpha = sigmoid(lse_D - lse_Z)``, ``z = (1 - alpha) z_Z + alpha z_D``; where ``lse_D`` is ``-inf`` nothing of D
    is visible and `z_rest` comes back untouched, whatever `z_demos` holds.

    Args:
        z_rest: output of the softmax over Z.
        lse_rest: log-sum-exp of the scores of Z, the sink included.
        z_demos: output of the softmax over D.
        lse_demos: log-sum-exp of the scores of D; ``-inf`` where none of D is visible.
    """
    hidden = torch.isneginf(lse_demos)
    difference = torch.where(hidden, 0.0, lse_demos) - lse_rest
    alpha, rest = torch.sigmoid(difference)[..., None], torch.sigmoid(-difference)[..., None]
    merged = rest * z_rest + alpha * torch.where(hidden[..., None], 0.0, z_demos)
    return torch.where(hidden[..., None], z_rest, merged)
