"""`HookedTransformer` of TransformerLens 3.x, as a `Host`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.models import _hooked_passes as hooked_passes
from metaopt_lens.models._families import family_of
from metaopt_lens.models._hooked_block import HookedBlock, fixed_norm, norm_gain, projections
from metaopt_lens.models._hooks import StopForward
from metaopt_lens.models._info import ModelInfo, dtype_name
from metaopt_lens.models._output_head import OutputHead
from metaopt_lens.models._passes import HostPass
from metaopt_lens.models._prefix import Prefix
from metaopt_lens.models._processing import processing_of

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

_POSITIONS = {"standard": "learned", "rotary": "rotary", "alibi": "alibi", "none": "none"}
_NORMALISATIONS = {"LN", "LNPre", "RMS", "RMSPre", None}


class HookedHost:
    """A HookedTransformer."""

    def __init__(self, model: Any) -> None:
        cfg = model.cfg
        _refuse_unsupported(cfg)
        self.model = model
        name, positions = str(cfg.model_name), _POSITIONS[cfg.positional_embedding_type]
        architecture = str(cfg.original_architecture or "HookedTransformer")
        blocks = list(model.blocks)
        self.info = ModelInfo.of_config(
            cfg,
            host="HookedTransformer",
            architecture=architecture,
            dtype=dtype_name(blocks[0].attn.W_Q.dtype),
            positions=positions,
            processing=processing_of(
                host_says=cfg.normalization_type in {"LNPre", "RMSPre"},
                gains=[norm_gain(block.ln1, cfg) for block in blocks],
                projections=lambda: [projections(block.attn, cfg) for block in blocks],
                value_biases=[block.attn.b_V for block in blocks],
                output_biases=[block.attn.b_O for block in blocks],
            ),
        )
        post_norm = family_of(architecture, positions).post_norm
        self.blocks = tuple(HookedBlock(block, cfg, layer, name, post_norm) for layer, block in enumerate(blocks))

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        return (self.model,)

    @property
    def hook_points(self) -> Mapping[str, HookPoint]:
        return self.model.hook_dict  # type: ignore[no-any-return]

    def head(self) -> OutputHead:
        model, cap = self.model, self.model.cfg.output_logits_soft_cap
        norm = model._modules.get("ln_final")  # none without normalisation
        return OutputHead(
            norm=(lambda residual: residual) if norm is None else norm,
            unembed=model.unembed,
            fixed_norm=None if norm is None else fixed_norm(norm),
            w_u=model.W_U,
            b_u=model.b_U,
            softcap=float(cap) if cap > 0 else None,
        )

    def forward(self, tokens: Tensor, prefix: Prefix | None) -> Tensor:
        cache = None if prefix is None else hooked_passes.cache_of(self.model, prefix, tokens.shape[0])
        return hooked_passes.run(self.model, tokens, cache)

    def fill(self, tokens: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        # Only with rotary positions does the cache hold other keys than the scores see.
        cache = hooked_passes.cache_of(self.model, None, 1) if self.info.positions == "rotary" else None
        with suppress(StopForward):
            hooked_passes.run(self.model, tokens, cache)
        return tuple if cache is None else (lambda: tuple(entry.past_keys[0] for entry in cache.entries))

    def watching(self, begin: Callable[[HostPass], Tensor | None]) -> AbstractContextManager[None]:
        return hooked_passes.watching(self.model, begin)


def _refuse_unsupported(cfg: Any) -> None:
    reasons = {
        f"positional embedding {cfg.positional_embedding_type!r}": cfg.positional_embedding_type not in _POSITIONS,
        f"normalisation {cfg.normalization_type!r}": cfg.normalization_type not in _NORMALISATIONS,
        "bidirectional attention": cfg.attention_dir != "causal",
        "log-n scaled queries": cfg.use_logn_attn,
        "length-dependent rotary embedding (dynamic NTK)": cfg.use_dynamic_ntk_rope,
        "use_attn_in (switch it off with set_use_attn_in(False))": cfg.use_attn_in,
        "use_split_qkv_input (switch it off with set_use_split_qkv_input(False))": cfg.use_split_qkv_input,
        "ungroup_grouped_query_attention (switch it off)": cfg.ungroup_grouped_query_attention,
        "4-bit weights": cfg.load_in_4bit,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"HookedTransformer {cfg.model_name} is not supported: {reason}.")
