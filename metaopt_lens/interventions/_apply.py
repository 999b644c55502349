"""Apply a meta-gradient to a zero-shot run, in any forward pass of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.dual import attention_scores, linear_weights, merge_softmax, visible_sources, weighted_values
from metaopt_lens.models import AttentionCall, Hook, HostPass, LensModel, refuse_momentum

if TYPE_CHECKING:
    from metaopt_lens.interventions._meta_gradient import MetaGradient


@dataclass(frozen=True, eq=False)
class AppliedMetaGradient:
    """Within ``intervene``, zero-shot tokens stand where they do in context, and chosen heads see the demonstrations.

    Sequences must begin with S (BOS, instruction), as the demonstrations' prompt does. S keeps its positions, all
    that follows is moved behind the demonstrations. Heads that are not chosen attend to the zero-shot prompt alone.

    Attributes:
        form: ``"softmax"``, the exact merge, or ``"linear"``: ``z + strength scale dW_ICL q``.
        scale: of the linear form; None for the layer's score scale over the number of demonstration tokens, the
            first-order factor of a softmax over the demonstrations.
    """

    meta_gradient: MetaGradient
    form: str = "softmax"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.form not in {"softmax", "linear"}:
            raise OptionError(f"form must be 'softmax' or 'linear', got {self.form!r}.")
        if self.form == "softmax" and self.scale is not None:
            raise OptionError("scale belongs to form='linear'; the softmax form takes strength.")

    def hooks(self, model: LensModel) -> list[Hook]:
        """The hooks that apply it.

        Raises:
            ModelMismatchError: it was made with another model or dtype.
            UnsupportedModelError: the model's tokens cannot be moved to their in-context positions.
        """
        refuse_momentum(model, "applying a meta-gradient")
        self.meta_gradient.check_model(model)
        model.check_movable()
        heads = self.meta_gradient.heads
        layers = [layer for layer in range(model.info.n_layers) if bool(heads[layer].any())]
        if self.meta_gradient.strength == 0.0:
            layers = []
        return model.placed_hooks(Place(self.meta_gradient, model), self._edit, layers=layers)

    def _edit(self, call: AttentionCall) -> Tensor:
        mg = self.meta_gradient
        inside = mg.tokens.mask(mg.chosen, mg.tokens.stop)
        where = inside.nonzero()[:, 0].to(call.z.device)
        k, v = (stored[call.layer].to(call.z.device)[where] for stored in (mg.k, mg.v))
        k, v = (t.expand(call.q.shape[0], *t.shape) for t in (k, v))
        if self.form == "softmax":
            change = _merged(call, k, v, where) - call.z
        else:
            scale = call.rule.scale / len(where) if self.scale is None else self.scale
            visible = visible_sources(call.rule, call.dst_positions, where.expand(call.q.shape[0], -1))
            weights = linear_weights(call.q, k, visible)
            change = scale * weighted_values(weights, v)
        chosen = mg.heads[call.layer].to(call.z.device)[:, None]
        return torch.where(chosen, call.z + mg.strength * change.to(call.z.dtype), call.z)


@dataclass(frozen=True)
class Place:
    """Says before every pass where its tokens stand: S where it is, the rest behind the demonstrations."""

    meta_gradient: MetaGradient
    model: LensModel

    def __call__(self, host_pass: HostPass) -> Int[Tensor, "batch slot"]:
        tokens = self.meta_gradient.tokens
        tokens.check_begins(host_pass, tokens.start, "S, what stands before the demonstrations")
        index = host_pass.index
        positions = torch.where(index >= tokens.start, index + tokens.n_demo_tokens, index)
        self.model.check_window(int(positions.max()) + 1, "the prompt, moved behind the demonstrations,")
        return positions


def _merged(
    call: AttentionCall,
    k: Float[Tensor, "batch demo_src kv_head d_head"],
    v: Float[Tensor, "batch demo_src kv_head d_head"],
    positions: Int[Tensor, " demo_src"],
) -> Float[Tensor, "batch dst head d_head"]:
    """z over the sequence's own tokens joined with the softmax over the demonstrations (docs/theory.md, section 5)."""
    own = call.scores()
    if call.rule.sinks is not None:  # counted once, on the zero-shot side
        column = call.rule.sinks.to(own)[:, None, None].expand(*own.shape[:-1], 1)
        own = torch.cat([own, column], dim=-1)
    scores = attention_scores(
        call.rule,
        call.q,
        k,
        dst_positions=call.dst_positions,
        src_positions=positions.expand(call.q.shape[0], -1),
    )
    lse = scores.logsumexp(-1)
    # Rows that see nothing of D: kept finite here, and left alone by the merge.
    weights = scores.masked_fill(torch.isneginf(lse)[..., None], 0.0).softmax(-1)
    return merge_softmax(call.z.to(weights.dtype), own.logsumexp(-1).mT, weighted_values(weights, v), lse.mT).to(
        call.z.dtype
    )
