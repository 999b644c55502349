"""Two guards of every recording: no intervention that acts on attention is on, and z is the sum of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens._types import HeadRef
from metaopt_lens.dual import (
    attention_scores,
    linear_weights,
    momentum_values,
    softmax_with_sink,
    visible_sources,
    weighted_values,
)
from metaopt_lens.models import AttentionCall, Hook, LensModel, functions_at

# Rounding of z and of the pattern in the dtype of z, with room to spare; sums over sources are made in float32 at
# least. Several hosts compute softmax or RMS norm in float32 whatever the dtype (docs/theory.md, section 7), so
# float64 is checked to float32's rounding.
_ROUNDINGS = 4.0


@dataclass(frozen=True, eq=False, repr=False)
class Acting:
    """A hook at z that changes nothing and says what acts on attention; `refuse_acting` finds it on the model.

    Attributes:
        name: of the intervention, with its article ("a meta-gradient").
    """

    name: str

    def __call__(self, z: Tensor) -> None:  # noqa: ARG002 - hooks are called with a tensor
        return None


def acting(model: LensModel, names: Sequence[str]) -> list[Hook]:
    """Hooks that let `refuse_acting` refuse by these names ("a meta-gradient")."""
    return [(model.hook_name("z", 0), Acting(name)) for name in names]


def acting_now(model: LensModel) -> list[str]:
    """Names of the interventions on attention whose hooks are attached to the model now."""
    attached = functions_at(model.hook_points[model.hook_name("z", 0)])
    return [function.name for function in attached if isinstance(function, Acting)]


def refuse_acting(model: LensModel, what: str) -> None:
    """Raise `OptionError` if an intervention on attention is on: `what` would not be that of the model.

    Args:
        model: a wrapped model.
        what: what was asked for ("decompose").

    Raises:
        OptionError: within ``with intervene(model, ...)`` of a meta-gradient or a knock-out.
    """
    if names := acting_now(model):
        why = (
            "the demonstrations would count twice, in the prompt and in the meta-gradient"
            if "meta-gradient" in names[-1]
            else "head outputs would not be the sum of their parts"
        )
        raise OptionError(
            f"{names[-1]} is applied to {model.info.name} (with intervene(...)), and {what} runs the model: {why}. "
            f"Call {what} outside the block. Weight updates and momentum attention may stay."
        )


def excess_over_parts(
    call: AttentionCall,
    at: Int[Tensor, "row dst"],
    pattern: Float[Tensor, "row head dst src"],
    eta: Float[Tensor, " head"] | None,
    *,
    with_pattern: bool,
) -> Float[Tensor, " head"]:
    """How far z is from ``sum_i a_i v_i`` (plus momentum), in units of what rounding allows: above 1 is not rounding.

    Where the pattern was rebuilt from q and k, it is allowed the rounding of the host's own scores too.

    Args:
        call: one layer of a running pass.
        at: the destinations of every row, as indices into the pass.
        pattern: attention probabilities at the destinations.
        eta: of the layer's momentum attention, if it is on.
        with_pattern: also require that the pattern the host shows is that of its q and k.

    Returns:
        The largest ratio of every head, over rows, destinations and dimensions.
    """
    rows = torch.arange(len(at), device=at.device)[:, None]
    with torch.no_grad():
        dtype, n_d = call.z.dtype, call.z.shape[-1]
        fine = torch.finfo(torch.float32).eps
        coarse = max(torch.finfo(dtype).eps, fine)
        v = call.v
        parts = weighted_values(pattern, v)  # row dst head d_head
        size = weighted_values(pattern, v.abs()).amax(-1)
        if eta is not None:
            momentum = momentum_values(v, eta.to(v.device))[:, call.offset :][rows, at]
            size = size + momentum_values(v.abs(), eta.to(v.device))[:, call.offset :][rows, at].amax(-1)
            parts = parts + momentum.to(parts)
        dst, src = call.dst_positions.expand(len(at), -1)[rows, at], call.src_positions.expand(len(at), -1)
        n_seen = (src[:, None] <= dst[..., None]).sum(-1)[:, None]
        allowed = (_ROUNDINGS * coarse + n_seen * fine).expand(pattern.shape[:-1])  # row head dst
        rebuilt = dtype == torch.float16 or call.host_pattern is None
        worst_pattern = torch.zeros(pattern.shape[1], device=v.device)
        if rebuilt or with_pattern:
            q, k = call.q[rows, at], call.k
            scores = attention_scores(call.rule, q, k, dst_positions=dst, src_positions=src)
            visible = visible_sources(call.rule, dst, src)
            terms = call.rule.scale * linear_weights(q.abs(), k.abs(), visible)
            largest = scores.masked_fill(torch.isneginf(scores), 0.0).abs().amax(-1)
            of_scores = _ROUNDINGS * coarse * largest + n_d * fine * terms.amax(-1)
            if rebuilt:
                allowed = allowed + of_scores
            else:
                own, _ = softmax_with_sink(scores, call.rule.sinks)
                off = (pattern - own).abs().amax(-1)
                worst_pattern = (off / (allowed + of_scores)).amax((0, 2))
        off = (call.z[rows, at].to(parts) - parts).abs().amax(-1)  # row dst head
        ratio = off.mT / (allowed * size.mT).clamp_min(torch.finfo(torch.float32).tiny)  # row head dst
        return torch.maximum(ratio.amax((0, 2)), worst_pattern.to(ratio)).float()


def require_parts(model: LensModel, layer: int, excess: Float[Tensor, " head"]) -> None:
    """Raise `UnsupportedModelError` if a head's output is not the sum of its parts; see `excess_over_parts`."""
    worst = int(excess.argmax())
    if float(excess[worst]) > 1:
        raise UnsupportedModelError(
            f"{model.info.name}: the output z of head {HeadRef(layer, worst)} is not what its attention pattern and "
            f"values give (off by {float(excess[worst]):.0f} times what rounding in {model.info.dtype} allows), so its "
            "parts would not add up: a hook changes z, the pattern or the scores. Remove it (model.reset_hooks()); "
            "hooks on queries, keys, values and weight updates may stay."
        )
