"""One block of a `HookedTransformer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.dual import ScoreRule
from metaopt_lens.models._experts import ExpertsSite
from metaopt_lens.models._fixed_norm import FixedNorm
from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._host import Positions, Use
from metaopt_lens.models._mlp import MlpSite, OutputNorm

_OUTSIDE_ATTENTION = {"resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"}


@dataclass(frozen=True, eq=False)
class HookedBlock:
    """One block of a HookedTransformer.

    Attributes:
        block: TransformerLens's own.
        cfg: the model's configuration.
        layer: which it is.
        name: of the model, for errors.
        post_norm: whether the architecture normalises the outputs of attention and MLP, and not their inputs.
        pattern_before_z: whether the attention pattern is seen before z.
    """

    block: Any
    cfg: Any
    layer: int
    name: str
    post_norm: bool
    pattern_before_z: bool = True

    def rule(self) -> ScoreRule:
        cfg, attn = self.cfg, self.block.attn
        slopes = None
        if cfg.positional_embedding_type == "alibi":
            slopes = attn.create_alibi_multipliers(cfg.n_heads, attn.W_Q.device).flatten()
        return ScoreRule(
            scale=1.0 / float(attn.attn_scale),
            softcap=float(cfg.attn_scores_soft_cap) if cfg.attn_scores_soft_cap > 0 else None,
            window=int(cfg.window_size) if attn.attn_type == "local" else None,
            alibi_slopes=slopes,
            sinks=attn.sinks if cfg.use_attention_sinks else None,
        )

    def w_o(self) -> Tensor:
        return self.block.attn.W_O  # type: ignore[no-any-return]

    def b_o(self) -> Tensor | None:
        return self.block.attn.b_O  # type: ignore[no-any-return]

    def norm_after_attention(self) -> FixedNorm | None:
        if self.cfg.use_normalization_before_and_after:
            return fixed_norm(self.block.ln1_post)
        return fixed_norm(self.block.ln1) if self.post_norm else None

    def has_bias(self, projection: str) -> bool:  # noqa: ARG002 - a HookedTransformer has them all
        return True

    @property
    def _norms_outputs(self) -> bool:
        return bool(self.cfg.use_normalization_before_and_after) or self.post_norm

    def hook_name(self, kind: str) -> str:
        if kind == "attn_out" and self._norms_outputs:
            raise UnsupportedModelError(f"{self.name} normalises the attention output before the hook that shows it.")
        return f"blocks.{self.layer}.{'' if kind in _OUTSIDE_ATTENTION else 'attn.'}hook_{kind}"

    def attention_input_hook(self, use: Use) -> Hook:
        # ln1 runs once each for q, k and v, so its hook fires three times with the same value.
        if self.post_norm:
            return self.hook_name("resid_pre"), use
        return self._normed_hook("ln1", "resid_pre", use)

    def query_key_hooks(self, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:  # noqa: ARG002
        rotated = "rot_" if self.cfg.positional_embedding_type == "rotary" else ""
        return [(self.hook_name(f"{rotated}q"), use_q), (self.hook_name(f"{rotated}k"), use_k)]

    def _normed_hook(self, norm: str, residual: str, use: Use) -> Hook:
        """A hook on the output of a norm, which HookedTransformer shows before its weight and bias only."""
        module = getattr(self.block, norm)
        kind = self.cfg.normalization_type
        if kind is None:
            return self.hook_name(residual), use

        def scaled(normalized: Tensor) -> None:
            x = normalized
            if kind in {"LN", "RMS"}:
                x = x * module.w
            if kind == "LN":
                x = x + module.b
            use(x)

        return f"blocks.{self.layer}.{norm}.hook_normalized", scaled

    def mlp(self) -> MlpSite | ExpertsSite | str | None:
        cfg = self.cfg
        if cfg.attn_only:
            return None
        if cfg.num_experts is not None:
            return "the MLP is a mixture of experts, which a HookedTransformer does not show"
        mlp, at = self.block.mlp, f"blocks.{self.layer}.mlp"
        if cfg.gated_mlp:
            matrices = {"in": mlp.W_in.mT, "gate": mlp.W_gate.mT}
            products = {"in": f"{at}.hook_pre_linear", "gate": f"{at}.hook_pre"}
        else:
            matrices, products = {"in": mlp.W_in.mT}, {"in": f"{at}.hook_pre"}
        return MlpSite(
            input_hook=self._mlp_input_hook,
            matrices=matrices,
            products=products,
            hidden_name=f"{at}.hook_post",
            w_out=mlp.W_out.mT,
            out_name=self.hook_name("mlp_out"),
            parallel=bool(cfg.parallel_attn_mlp),
            norm=self._output_norm(),
        )

    def _output_norm(self) -> OutputNorm | None:
        if not self._norms_outputs:
            return None
        name = "ln2" if self.post_norm else "ln2_post"
        return OutputNorm(f"blocks.{self.layer}.{name}.hook_normalized", self.hook_name("mlp_out"))

    def _mlp_input_hook(self, use: Use) -> Hook:
        if self.post_norm:
            return self.hook_name("resid_mid"), use
        return self._normed_hook("ln2", "resid_pre" if self.cfg.parallel_attn_mlp else "resid_mid", use)


def projections(attn: Any, cfg: Any) -> list[Tensor]:
    """Query, key and value matrices, ``[d_model, (head d_head)]``."""
    grouped = cfg.n_key_value_heads is not None
    k, v = (attn._W_K, attn._W_V) if grouped else (attn.W_K, attn.W_V)
    return [w.transpose(0, 1).flatten(1) for w in (attn.W_Q, k, v)]


def fixed_norm(norm: Any) -> FixedNorm:
    """A norm of HookedTransformer as a linear map with a scale; folded norms have neither gain nor bias left."""
    own = norm._parameters
    return FixedNorm(
        # The final norm is RMS under `final_rms`, whatever the blocks' are.
        kind="RMS" if type(norm).__name__.startswith("RMS") else "LN",
        eps=float(norm.eps),
        gain=own.get("w"),
        bias=own.get("b"),
    )


def norm_gain(norm: Any, cfg: Any) -> Tensor | None:
    """The factor a norm puts on its normalised input; folded norms have none left, which is 1."""
    if cfg.normalization_type is None:
        return None
    return norm.w if cfg.normalization_type in {"LN", "RMS"} else torch.ones(1)
