"""`TransformerBridge` of TransformerLens 3.x and 4.x over a transformers model, as a `Host`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.models._bridge_block import BridgeBlock
from metaopt_lens.models._bridge_norm import fixed_norm, gain_of
from metaopt_lens.models._bridge_passes import cache_of, forgets_cache, reminded, watching
from metaopt_lens.models._families import Family, family_of
from metaopt_lens.models._gguf_source import quantization_of
from metaopt_lens.models._hooks import StopForward, check_hook_names
from metaopt_lens.models._info import ModelInfo, dtype_name
from metaopt_lens.models._output_head import OutputHead
from metaopt_lens.models._passes import HostPass
from metaopt_lens.models._prefix import Prefix
from metaopt_lens.models._processing import processing_of

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

# Rotary types whose angles depend on how long the sequence is: nothing cached stays valid.
_LENGTH_DEPENDENT_ROTARY = {"dynamic", "longrope"}


class BridgeHost:
    """A bridge over a transformers model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hook_points: Mapping[str, HookPoint] = dict(model.hook_dict)
        self.info, self.blocks, self._family = read_bridge(model, self.hook_points)

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        return self.model, self.model.original_model  # what no component bridges is not among the bridge's own modules

    def head(self) -> OutputHead:
        return bridge_head(self.model, self._family)

    def forward(self, tokens: Tensor, prefix: Prefix | None) -> Tensor:
        if prefix is None:
            return self.model(tokens)  # type: ignore[no-any-return]
        cache = cache_of(prefix, tokens.shape[0])
        with reminded([block.block.attn for block in self.blocks], prefix):
            return self.model(tokens, past_key_values=cache, use_cache=True)  # type: ignore[no-any-return]

    def fill(self, tokens: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        with suppress(StopForward):
            self.model(tokens)
        return tuple  # the host's cache holds keys as the scores see them: nothing else to keep

    def watching(self, begin: Callable[[HostPass], Tensor | None]) -> AbstractContextManager[None]:
        forgets = any(forgets_cache(block.block.attn) for block in self.blocks)
        return watching(self.model.original_model, self.info, begin, forgets=forgets)


def read_bridge(model: Any, hook_points: Mapping[str, HookPoint]) -> tuple[ModelInfo, tuple[BridgeBlock, ...], Family]:
    """Sizes, blocks and family of a bridge.

    Raises:
        UnsupportedModelError: an architecture that cannot be split.
    """
    cfg = model.cfg
    name, architecture, positions = str(cfg.model_name), str(cfg.architecture), _positions(cfg)
    _refuse_unsupported(model, f"{name} ({architecture})")
    attention = [block.attn for block in model.blocks]
    family = family_of(architecture, positions, type(attention[0]))
    info = ModelInfo.of_config(
        cfg,
        host="TransformerBridge",
        architecture=architecture,
        dtype=dtype_name(next(model.original_model.parameters()).dtype),
        positions=positions,
        processing=processing_of(
            host_says=bool(model._weights_processed),
            gains=[gain_of(block._modules.get("ln1"), cfg) for block in model.blocks],
            projections=lambda: [_projections(attn) for attn in attention],
            value_biases=[attn.b_V for attn in attention],
            output_biases=[attn.b_O for attn in attention],
        ),
        quantization=quantization_of(_config(model)),
    )
    pattern_before_z = not all(_is_native_attention(attn) for attn in attention)
    blocks = tuple(
        BridgeBlock(block, cfg, layer, family, window, pattern_before_z, info.n_heads, info.d_head)
        for layer, (block, window) in enumerate(zip(model.blocks, _windows(model, info.n_layers), strict=True))
    )
    points = [block.hook_name(kind) for block in blocks for kind in ("in", "q", "k", "v", "z")]
    check_hook_names(hook_points, points, owner=f"{name} ({architecture})")
    return info, blocks, family


def bridge_head(model: Any, family: Family) -> OutputHead:
    """Final norm, unembedding and soft-cap of a bridge."""
    norm = model._modules.get("ln_final")
    return OutputHead(
        norm=(lambda residual: residual) if norm is None else norm,
        unembed=model.unembed,
        fixed_norm=None if norm is None else fixed_norm(norm, model.cfg),
        w_u=model.unembed.original_component.weight.mT,
        b_u=getattr(model.unembed.original_component, "bias", None),
        softcap=family.logit_cap(model.original_model),
    )


def _projections(attn: Any) -> list[Tensor]:
    """Query, key and value matrices, ``[d_model, (head d_head)]``."""
    return [w.transpose(0, 1).flatten(1) for w in (attn.W_Q, attn.W_K, attn.W_V)]


def _config(model: Any) -> Any:
    """transformers' configuration; None for TransformerLens's own model."""
    return getattr(model.original_model, "config", None)


def _positions(cfg: Any) -> str:
    kind = str(cfg.positional_embedding_type)
    return {"standard": "learned"}.get(kind, kind)


def _is_native_attention(attn: Any) -> bool:
    """Whether transformers' own attention runs inside: its pattern then shows up only after z."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    return type(attn) is AttentionBridge


def _windows(model: Any, n_layers: int) -> Sequence[int | None]:
    from transformers import DynamicCache

    config = _config(model)
    layers = DynamicCache(config=config).layers if config is not None else []
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return windows or [None] * n_layers


def _refuse_unsupported(model: Any, owner: str) -> None:
    from transformer_lens.model_bridge.generalized_components.mla_attention import MLAAttentionBridge

    cfg, config = model.cfg, _config(model)
    refused = family_of(str(cfg.architecture), _positions(cfg)).refused
    if refused:
        raise UnsupportedModelError(f"{owner} is not supported: {refused}.")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{owner} is an encoder-decoder; only decoder-only models are supported.")
    if str(cfg.architecture).endswith("ForMaskedLM"):
        raise UnsupportedModelError(f"{owner} is an encoder; only decoder-only models are supported.")
    if "blocks" not in model._modules:
        raise UnsupportedModelError(f"{owner} has no decoder blocks: encoder and other models are not supported.")
    for layer, block in enumerate(model.blocks):
        if "attn" not in block._modules:
            raise UnsupportedModelError(
                f"{owner}: layer {layer} has no attention (state-space and hybrid models are not supported)."
            )
        if getattr(block.attn.original_component, "clip_qkv", None):
            raise UnsupportedModelError(
                f"{owner}: layer {layer} clips queries, keys and values (clip_qkv), behind the hooks that show them."
            )
        if isinstance(block.attn, MLAAttentionBridge):
            raise UnsupportedModelError(
                f"{owner} uses multi-head latent attention (MLA), which has no per-head key and value projection."
            )
        if not (block.attn.is_causal and getattr(block.attn.original_component, "causal", True)):
            raise UnsupportedModelError(f"{owner}: layer {layer} attends in both directions (an encoder).")
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rotary, *rotary.values()) if isinstance(part, dict)}
    if kinds & _LENGTH_DEPENDENT_ROTARY:
        raise UnsupportedModelError(
            f"{owner} has a rotary embedding that depends on the sequence length ({', '.join(sorted(kinds))})."
        )
    for flag in ("use_attn_in", "use_split_qkv_input"):
        if getattr(cfg, flag, False):
            raise UnsupportedModelError(f"{owner}: switch {flag} off with set_{flag}(False) first.")
