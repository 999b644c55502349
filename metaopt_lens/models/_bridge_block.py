"""One block of a `TransformerBridge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt_lens.dual import ScoreRule
from metaopt_lens.models._bridge_norm import fixed_norm
from metaopt_lens.models._experts import ExpertsSite, experts_of
from metaopt_lens.models._families import Family
from metaopt_lens.models._fixed_norm import FixedNorm
from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._host import Positions, Use
from metaopt_lens.models._mlp import MlpSite, OutputNorm

_OUTSIDE_ATTENTION = {"resid_pre", "resid_mid", "resid_post", "mlp_out"}


@dataclass(frozen=True, eq=False)
class BridgeBlock:
    """One block of a bridge.

    Attributes:
        block: TransformerLens's own.
        cfg: the model's configuration.
        layer: which it is.
        family: its row of the table.
        window: of its attention as transformers' cache knows it, None without one.
        pattern_before_z: whether the attention pattern is seen before z.
        n_heads: query heads.
        d_head: size of one.
    """

    block: Any
    cfg: Any
    layer: int
    family: Family
    window: int | None
    pattern_before_z: bool
    n_heads: int
    d_head: int

    @property
    def _module(self) -> Any:
        return self.block.attn.original_component

    def rule(self) -> ScoreRule:
        slopes = self.family.slopes
        return ScoreRule(
            scale=self.family.scale(self._module, self.d_head),
            softcap=self.family.softcap(self._module),
            window=self.window if self.family.window is None else self.family.window(self._module),
            alibi_slopes=None if slopes is None else slopes(self.n_heads, self._device),
            sinks=getattr(self._module, "sinks", None),
        )

    @property
    def _device(self) -> torch.device:
        return next(self.block.parameters()).device  # type: ignore[no-any-return]

    def w_o(self) -> Tensor:
        return self.block.attn.W_O  # type: ignore[no-any-return]

    def b_o(self) -> Tensor | None:
        return self.block.attn.b_O  # type: ignore[no-any-return]

    def norm_after_attention(self) -> FixedNorm | None:
        name = self._norm_after("ln1")
        return None if name is None else fixed_norm(self.block._modules[name], self.cfg)

    def has_bias(self, projection: str) -> bool:
        return getattr(self.block.attn, f"b_{projection.upper()}") is not None

    def hook_name(self, kind: str) -> str:
        if kind in _OUTSIDE_ATTENTION:
            return f"blocks.{self.layer}.hook_{kind}"
        return f"blocks.{self.layer}.attn." + ("o.hook_out" if kind == "attn_out" else f"hook_{kind}")

    def attention_input_hook(self, use: Use) -> Hook:
        return f"blocks.{self.layer}.attn.hook_in", use

    def query_key_hooks(self, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:
        return self.family.reader.hooks(self.block.attn, f"blocks.{self.layer}.attn", use_q, use_k, positions)

    def mlp(self) -> MlpSite | ExpertsSite | str | None:
        from transformer_lens.model_bridge.generalized_components.block import ParallelBlockBridge
        from transformer_lens.model_bridge.generalized_components.bloom_mlp import BloomMLPBridge
        from transformer_lens.model_bridge.generalized_components.gated_mlp import GatedMLPBridge
        from transformer_lens.model_bridge.generalized_components.mlp import MLPBridge
        from transformer_lens.model_bridge.generalized_components.moe import MoEBridge

        mlp, at = self.block._modules.get("mlp"), f"blocks.{self.layer}.mlp"
        if mlp is None:
            return None
        if isinstance(mlp, MoEBridge):
            return experts_of(mlp, at)
        if type(mlp) not in {MLPBridge, GatedMLPBridge, BloomMLPBridge}:
            return f"its MLP is of an unknown kind ({type(mlp).__name__})"
        names = ("gate", "in") if type(mlp) is GatedMLPBridge else ("in",)  # in the order they are computed
        return MlpSite(
            input_hook=lambda use: (f"{at}.{names[0]}.hook_in", use),
            matrices={name: getattr(mlp, f"W_{name}").mT for name in names},
            products={name: f"{at}.{name}.hook_out" for name in names},
            hidden_name=f"{at}.out.hook_in",
            w_out=mlp.W_out.mT,
            out_name=f"{at}.out.hook_out",
            parallel=isinstance(self.block, ParallelBlockBridge),
            norm=self._output_norm(),
        )

    def _output_norm(self) -> OutputNorm | None:
        name = self._norm_after("ln2")
        if name is None:
            return None
        at = f"blocks.{self.layer}.{name}"
        return OutputNorm(normalized_name=f"{at}.hook_normalized", out_name=f"{at}.hook_out")

    def _norm_after(self, name: str) -> str | None:
        """The norm on what attention (``ln1``) or the MLP (``ln2``) writes; 3.x names OLMo-2's like one before it."""
        after = f"{name}_post"
        return after if after in self.block._modules else name if self.family.post_norm else None
