"""The tidy table of a decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

    from metaopt_lens.decomposition._decomposition import Decomposition


_STRENGTH = "meta_gradient_residual_norm"


def decomposition_frame(result: Decomposition) -> pd.DataFrame:
    """One row per position, layer and head; see the README for the columns."""
    import pandas as pd

    n_layers, n_heads = result.model.n_layers, result.model.n_heads
    columns = {name: t.detach().float().cpu().reshape(-1, n_layers, n_heads) for name, t in _values(result).items()}
    n_dst = len(result.positions)
    dst, layer, head = torch.meshgrid(torch.arange(n_dst), torch.arange(n_layers), torch.arange(n_heads), indexing="ij")
    frame = pd.DataFrame(
        {
            "position": torch.tensor(result.positions)[dst.flatten()].numpy(),
            "token": [result.tokenized.tokens[result.positions[i]] for i in dst.flatten().tolist()],
            "layer": layer.flatten().numpy(),
            "head": head.flatten().numpy(),
        }
    )
    frame["name"] = [f"L{a}H{b}" for a, b in zip(frame["layer"], frame["head"], strict=True)]
    for name, tensor in columns.items():
        frame[name] = tensor.flatten().numpy()
    return frame


def _values(result: Decomposition) -> dict[str, Tensor]:
    softmax, linear = result.softmax, result.linear
    values = {
        "mass": softmax.mass,
        "z_norm": (softmax.z + result.momentum).norm(dim=-1),
        "zero_shot_norm": softmax.zero_shot.norm(dim=-1),
        "meta_gradient_norm": softmax.meta_gradient.norm(dim=-1),
        **({} if result.stored_strength is None and result.source is None else {_STRENGTH: result.strength}),
        "update_norm": softmax.update.norm(dim=-1),
        "fidelity": result.fidelity,
        "linear_zero_shot_norm": linear.zero_shot.norm(dim=-1),
        "linear_meta_gradient_norm": linear.meta_gradient.norm(dim=-1),
    }
    if result.eta is not None:
        values["eta"] = result.eta.expand(len(result.positions), *result.eta.shape)
        values["momentum_norm"] = result.momentum.norm(dim=-1)
        values["momentum_meta_gradient_norm"] = result.momentum_meta_gradient.norm(dim=-1)
    if result.z_zero_shot is not None:
        effects = result.effects
        values["total_effect_norm"] = effects.total.norm(dim=-1)
        values["direct_effect_norm"] = effects.direct.norm(dim=-1)
        values["indirect_and_position_norm"] = effects.indirect_and_position.norm(dim=-1)
        if effects.indirect is not None and effects.position is not None:
            values["indirect_effect_norm"] = effects.indirect.norm(dim=-1)
            values["position_effect_norm"] = effects.position.norm(dim=-1)
    return values


def describe(result: Decomposition) -> str:
    """A few lines of text: where, how many tokens, attention mass, fidelity, strongest heads."""
    m, t = result.model, result.tokenized
    weights = f"; weights with {' and '.join(m.processing)}" if m.processing else ""
    where = "all query positions" if result.keep_position_axis else f"position {result.positions[0]}"
    # [*dst layer head] -> [dst layer head] -> [layer head]
    mass = result.softmax.mass.detach().reshape(-1, m.n_layers, m.n_heads).mean(0)
    fidelity = result.fidelity.detach().reshape(-1, m.n_layers, m.n_heads).mean(0)
    lines = [
        f"Decomposition of {m.name} ({m.n_layers} layers x {m.n_heads} heads{weights}) at {where} "
        f"({t.tokens[result.positions[-1]]!r})",
        f"  {len(t.demos)} demonstrations in {len(t.demonstrations)} tokens, "
        f"query of {len(t.query)} tokens, {len(t.prefix)} before",
        f"  attention mass on the demonstrations: mean {mass.mean():.3f}, highest {mass.max():.3f}",
        f"  linear relaxation: mean cosine {fidelity.mean():.3f} to the exact output",
    ]
    if result.stored_strength is not None or result.source is not None:
        lines.append("  largest meta-gradients in the residual stream: " + ", ".join(map(str, result.heads(5))))
    if result.eta is not None:
        share = float(result.momentum.detach().norm() / result.z.detach().norm())
        highest = float(result.eta.detach().max())
        lines.append(f"  momentum attention (eta up to {highest:.3g}): norm {share:.3f} of z's")
    return "\n".join(lines)
