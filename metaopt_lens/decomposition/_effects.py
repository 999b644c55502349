"""What the demonstrations change against the real zero-shot runs, and the split in the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import SoftmaxParts
from metaopt_lens.runs import Runs, momentum_part


@dataclass(frozen=True, eq=False)
class Effects:
    """Where the change from zero-shot to in-context comes from: ``total = direct + indirect + position``.

    Attributes:
        total: ``z_ICL - z_ZS``, against the plain zero-shot run (the paper's ICL update).
        direct: ``z_ICL - z_without``: attending to the demonstrations here and now.
        indirect: ``z_without - z_ZSm``: q, k, v changed by what earlier layers read from the demonstrations.
        position: ``z_ZSm - z_ZS``: the query standing further back.
        indirect_and_position: the last two together; the only one known when the position-matched run was not made.
    """

    total: Float[Tensor, "*dst layer head d_head"]
    direct: Float[Tensor, "*dst layer head d_head"]
    indirect_and_position: Float[Tensor, "*dst layer head d_head"]
    indirect: Float[Tensor, "*dst layer head d_head"] | None
    position: Float[Tensor, "*dst layer head d_head"] | None


def effects_of(runs: Runs, parts: SoftmaxParts) -> Effects:
    """Direct, indirect and position effect, ``[dst, layer, head, d_head]`` (docs/theory.md, section 2).

    Args:
        runs: with ``"icl"``, ``"zs"`` and, to tell indirect from position effect, ``"zs_matched"``.
        parts: `softmax_parts` of the in-context run.

    Raises:
        OptionError: no zero-shot run was made.
    """
    if "zs" not in runs:
        raise OptionError("no zero-shot run was made: decompose with zero_shot_runs='both' or 'plain'.")
    icl = runs.icl
    # The average is a sum: D's share is taken out and nothing is renormalised.
    of_demos = momentum_part(icl, icl.tokens.demonstrations)
    without = parts.without_demos + momentum_part(icl, TokenSpan(0, icl.tokens.n_tokens)) - of_demos
    unseen = (parts.mass[..., None] == 0) & (of_demos == 0)
    z, plain = icl.z.to(without), runs.zs.z.to(without)
    direct = torch.where(unseen, 0.0, z - without)
    indirect = position = None
    if "zs_matched" in runs:
        matched = runs.zs_matched.z.to(without)
        indirect, position = z - direct - matched, matched - plain
    return Effects(
        total=z - plain,
        direct=direct,
        indirect_and_position=z - plain - direct,
        indirect=indirect,
        position=position,
    )


@dataclass(frozen=True, eq=False)
class ResidualParts:
    """The split in the residual stream, after W_O. The bias b_O belongs to no head.

    ``zero_shot.sum(head) + meta_gradient.sum(head) + bias`` is the layer's attention output, with
    ``momentum.sum(head)`` under momentum attention.
    """

    zero_shot: Float[Tensor, "*dst layer head d_model"]
    meta_gradient: Float[Tensor, "*dst layer head d_model"]
    bias: Float[Tensor, "layer d_model"]
    momentum: Float[Tensor, "*dst layer head d_model"] | None = None

    @property
    def attention_output(self) -> Float[Tensor, "*dst layer d_model"]:
        """All heads and the bias together."""
        parts = self.zero_shot + self.meta_gradient
        return (parts if self.momentum is None else parts + self.momentum).sum(-2) + self.bias
