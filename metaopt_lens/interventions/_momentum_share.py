"""What a meta-gradient and a knock-out do to the moving average of values (docs/theory.md, section 6).

The average is linear in the values, so the demonstrations' share is added or taken away; nothing is renormalised.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.dual import momentum_state, momentum_values
from metaopt_lens.interventions._apply import AppliedMetaGradient
from metaopt_lens.interventions._heads import head_mask
from metaopt_lens.interventions._knock_out import KnockOut
from metaopt_lens.interventions._momentum import Correction
from metaopt_lens.models import AttentionCall, HostPass, LensModel


def with_meta_gradient(applied: AppliedMetaGradient, eta: Float[Tensor, "layer head"]) -> Correction:
    """Move Q behind the demonstrations: their values join the chosen heads' average, and S is further away.

    Every token of Q, at position t, gets ``eta^(t - stop) (strength E_D + (eta^|D| - 1) E_S)``: E_D is what D leaves at
    the position ``stop`` behind it, E_S what S leaves right behind itself.
    """
    mg = applied.meta_gradient
    tokens = mg.tokens

    def correct(layer: int, host_pass: HostPass, values: Tensor, average: Tensor) -> Tensor:
        index, valid = host_pass.sources(layer, values)
        rate, v = eta[layer].to(average), mg.v[layer].to(average)
        inside = tokens.mask(mg.chosen, tokens.stop).to(v.device)
        of_demos = momentum_state(v.masked_fill(~inside[:, None, None], 0.0), rate)
        of_start = momentum_state(values, rate, valid=valid & (index < tokens.start))  # [batch, head, d_head]
        chosen = mg.heads[layer].to(v.device)[:, None]
        share = torch.where(chosen, mg.strength * of_demos, 0.0)
        share = share + (rate[:, None] ** tokens.n_demo_tokens - 1) * of_start
        behind = index[:, -average.shape[1] :] - tokens.start  # [batch, dst]
        fade = rate ** behind.clamp_min(0)[..., None].to(average)  # [batch, dst, head]
        moved = average + fade[..., None] * share[:, None]
        return torch.where((behind >= 0)[..., None, None], moved, average)

    return correct


def without_knocked_out(model: LensModel, knock_out: KnockOut, eta: Float[Tensor, "layer head"]) -> Correction:
    """Take the hidden demonstrations' share out of the chosen heads' average, at the chosen positions."""
    tokens = knock_out._tokens(model)
    heads = head_mask(model.info, knock_out.heads, knock_out.layers)
    demos = range(len(tokens.spans)) if knock_out.demos is None else tokens.check_demos(knock_out.demos)
    inside = tokens.mask(tuple(demos), model.info.n_ctx)

    def correct(layer: int, host_pass: HostPass, values: Tensor, average: Tensor) -> Tensor:
        index, valid = host_pass.sources(layer, values)
        n_dst = average.shape[1]
        kept = values.masked_fill((inside.to(valid.device)[index] & valid)[..., None, None], 0.0)
        without = momentum_values(kept, eta[layer].to(average), valid=valid)[:, -n_dst:]
        call = AttentionCall(
            layer, q=average, k=values, v=values, z=average, rule=model.score_rule(layer),
            dst_positions=index[:, -n_dst:], src_positions=index, padded=~valid,
        )  # fmt: skip
        where = knock_out._where(call, tokens.stop)
        chosen = where[:, :, None] & heads[layer].to(where.device)
        return torch.where(chosen[..., None], without, average)

    return correct
