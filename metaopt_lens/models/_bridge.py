"""`TransformerBridge` of TransformerLens 3.x and 4.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.dual import ScoreRule
from metaopt_lens.models._abstract import AttentionModel, ModelInfo, Prefix, dtype_name, refuse_blocks
from metaopt_lens.models._gguf import quantization_of
from metaopt_lens.models._hooks import Hook, StopForward, check_hook_names
from metaopt_lens.models._mlp import MlpSite
from metaopt_lens.models._passes import HostPass, PastKeysValues
from metaopt_lens.models._processing import processing_of

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformers import PreTrainedTokenizerBase

# Rotary types whose angles depend on how long the sequence is: nothing cached stays valid.
_LENGTH_DEPENDENT_ROTARY = {"dynamic", "longrope"}
_POST_NORM = {"Olmo2ForCausalLM", "Olmo3ForCausalLM"}


class BridgeModel(AttentionModel):
    """A wrapped `TransformerBridge`."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self._hook_points: Mapping[str, HookPoint] = dict(host.hook_dict)
        cfg = host.cfg
        name = str(cfg.model_name)
        _refuse_unsupported(host, self._hook_points, name)
        self.info = ModelInfo(
            name=name,
            host="TransformerBridge",
            architecture=str(cfg.architecture),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            dtype=dtype_name(next(host.original_model.parameters()).dtype),
            positions=_positions(cfg),
            processing=processing_of(
                folded_norms=bool(host.compatibility_mode and host._weights_processed),
                value_biases=[block.attn.b_V for block in host.blocks],
                output_biases=[block.attn.b_O for block in host.blocks],
            ),
            quantization=quantization_of(_config(host)),
        )
        self._windows = _windows(_config(host), self.info.n_layers)
        self._pattern_before_z = not all(_is_native_attention(block.attn) for block in host.blocks)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.host.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.host.original_model.parameters()).device  # type: ignore[no-any-return]

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        return self.host, self.host.original_model  # what no component bridges is not among the host's own modules

    @property
    def hook_points(self) -> Mapping[str, HookPoint]:
        return self._hook_points

    @property
    def pattern_before_z(self) -> bool:
        return self._pattern_before_z

    def _attn(self, layer: int) -> Any:
        return self.host.blocks[layer].attn

    def score_rule(self, layer: int) -> ScoreRule:
        module = self._attn(layer).original_component
        architecture = self.info.architecture
        slopes = None
        if architecture == "BloomForCausalLM":
            scale = float(module.inv_norm_factor)
            slopes = _bloom_slopes(self.info.n_heads, self.device)
        elif architecture == "GPTJForCausalLM":
            scale = 1.0 / float(module.scale_attn)
        else:
            scale = float(getattr(module, "scaling", self.info.d_head**-0.5))
        softcap = getattr(module, "attn_logit_softcapping", None)
        return ScoreRule(
            scale=scale,
            softcap=None if softcap is None else float(softcap),
            window=self._windows[layer],
            alibi_slopes=slopes,
            sinks=getattr(module, "sinks", None),
        )

    def w_o(self, layer: int) -> Tensor:
        return self._attn(layer).W_O  # type: ignore[no-any-return]

    def b_o(self, layer: int) -> Tensor | None:
        return self._attn(layer).b_O  # type: ignore[no-any-return]

    def has_bias(self, projection: str, layer: int) -> bool:
        return getattr(self._attn(layer), f"b_{projection.upper()}") is not None

    def residual_hook(self, end: str, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_{end}"

    def early_exit(self, residual: Tensor) -> Tensor:
        normed = self.host.ln_final(residual) if "ln_final" in self.host._modules else residual
        logits: Tensor = self.host.unembed(normed)
        cap = self._logit_cap()
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _logit_cap(self) -> float | None:
        return getattr(_config(self.host), "final_logit_softcapping", None)

    def hook_name(self, kind: str, layer: int) -> str:
        suffix = "o.hook_out" if kind == "attn_out" else f"hook_{kind}"
        return f"blocks.{layer}.attn.{suffix}"

    def mlp_site(self, layer: int) -> MlpSite:
        from transformer_lens.model_bridge.generalized_components.block import ParallelBlockBridge
        from transformer_lens.model_bridge.generalized_components.bloom_mlp import BloomMLPBridge
        from transformer_lens.model_bridge.generalized_components.gated_mlp import GatedMLPBridge
        from transformer_lens.model_bridge.generalized_components.mlp import MLPBridge
        from transformer_lens.model_bridge.generalized_components.moe import MoEBridge

        block = self.host.blocks[layer]
        mlp, at = block._modules.get("mlp"), f"blocks.{layer}.mlp"
        refuse_blocks(
            self.info.name,
            {
                "it is attention-only": mlp is None,
                "attention and MLP run in parallel": isinstance(block, ParallelBlockBridge),
                "the MLP is a mixture of experts": isinstance(mlp, MoEBridge),
                "the MLP's output is normalised": "ln2_post" in block._modules or self.info.architecture in _POST_NORM,
                f"its MLP is of an unknown kind ({type(mlp).__name__})": type(mlp)
                not in {MLPBridge, GatedMLPBridge, BloomMLPBridge},
            },
        )
        names = ("gate", "in") if type(mlp) is GatedMLPBridge else ("in",)  # in the order they are computed
        return MlpSite(
            input_hook=lambda use: (f"{at}.{names[0]}.hook_in", use),
            matrices={name: getattr(mlp, f"W_{name}").mT for name in names},
            products={name: f"{at}.{name}.hook_out" for name in names},
            out_name=f"{at}.out.hook_out",
        )

    def attention_input_hook(self, layer: int, use: Callable[[Tensor], None]) -> Hook:
        return f"blocks.{layer}.attn.hook_in", use

    def query_key_hooks(
        self,
        layer: int,
        use_q: Callable[[Tensor], None],
        use_k: Callable[[Tensor], None],
        *,
        offset: int,
        positions: Callable[[], Tensor] | None = None,
    ) -> list[Hook]:
        from transformer_lens.model_bridge.generalized_components.joint_qkv_position_embeddings_attention import (
            JointQKVPositionEmbeddingsAttentionBridge,
        )

        at = f"blocks.{layer}.attn"
        if self.info.positions != "rotary":
            return [(f"{at}.hook_q", use_q), (f"{at}.hook_k", use_k)]
        attn = self._attn(layer)
        if isinstance(attn, JointQKVPositionEmbeddingsAttentionBridge):
            return _neox_hooks(attn, at, use_q, use_k)
        if self.info.architecture == "GPTJForCausalLM":
            return _gptj_hooks(attn.original_component, at, use_q, use_k, offset, positions)
        return [(f"{at}.hook_rot_q", use_q), (f"{at}.hook_rot_k", use_k)]

    def _cache(self, batch: int, prefix: Prefix | None) -> Any:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()  # without a config: with one, sliding layers drop keys
        if prefix is not None:
            for layer in zip(prefix.k, prefix.v, strict=True):
                k, v = (t.transpose(0, 1).expand(batch, -1, -1, -1) for t in layer)
                held = DynamicLayer()
                v = v.to(k.dtype)  # OLMo-2's rotary promotes keys, and the host's own cache then takes values along
                held.lazy_initialization(k, v)
                held.keys, held.values = k, v  # views: `update` would copy them for every sequence
                cache.layers.append(held)
        return cache

    def _forward(self, tokens: Tensor, prefix: Prefix | None) -> Tensor:
        if prefix is None:
            return self.host(tokens)  # type: ignore[no-any-return]
        cache = self._cache(tokens.shape[0], prefix)
        return self.host(tokens, past_key_values=cache, use_cache=True)  # type: ignore[no-any-return]

    def _forward_prefix(self, tokens: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        with suppress(StopForward):
            self.host(tokens)
        return tuple  # the host's cache holds keys as the scores see them: nothing else to keep

    def _refuse_immovable(self) -> None:
        hf = self.host.original_model
        if self.info.positions not in {"alibi", "none"} and "position_ids" not in signature(hf.forward).parameters:
            raise UnsupportedModelError(
                f"{self.info.name} ({self.info.architecture}) takes no position_ids, so a zero-shot prompt's "
                "tokens cannot be put where they stand in context. Run them behind the demonstrations' cache instead: "
                "MetaGradient.run(model, tokens)."
            )

    @contextmanager
    def _watching(self, begin: Callable[[HostPass], Tensor | None]) -> Iterator[None]:
        hf: Any = self.host.original_model
        takes_positions = "position_ids" in signature(hf.forward).parameters

        def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            tokens = args[0] if args else options.get("input_ids")
            source = options["inputs_embeds"] if tokens is None else tokens
            cache = options.get("past_key_values")
            n_past = 0 if cache is None else int(cache.get_seq_length())
            batch, n_all = source.shape[0], n_past + source.shape[1]
            mask = options.get("attention_mask")
            if mask is None:
                mask = torch.ones(batch, n_all, dtype=torch.long, device=source.device)
            elif mask.ndim != 2 or mask.shape[1] != n_all:
                raise OptionError(
                    f"under a meta-gradient or knock-out the attention_mask must be [batch, {n_all}] (cached and new "
                    f"tokens), got {list(mask.shape)}."
                )
            moved = begin(HostPass(tokens=tokens, valid=mask.bool(), n_past=n_past, past=_past(cache)))
            if moved is None:
                return args, options
            # With the mask given, transformers does not take the gap in position_ids for packed sequences.
            changed = {**options, "attention_mask": mask}
            if takes_positions:
                changed["position_ids"] = moved[:, n_past:]
            return args, changed

        handle = hf.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _move_hooks(self, current: Callable[[], tuple[HostPass, Tensor | None]]) -> list[Hook]:  # noqa: ARG002
        return []  # position_ids do it


def _past(cache: Any) -> Callable[[int], PastKeysValues]:
    """Keys and values a transformers cache holds now (it grows during the pass)."""
    layers = [] if cache is None else [layer for layer in cache.layers]
    held = [(entry.keys, entry.values) if entry.is_initialized else (None, None) for entry in layers]

    def of(layer: int) -> PastKeysValues:
        k, v = held[layer] if layer < len(held) else (None, None)
        if k is None or v is None or not k.numel():
            return None, None
        return k.transpose(1, 2), v.transpose(1, 2)

    return of


def _config(host: Any) -> Any:
    """transformers' configuration; None for TransformerLens's own model."""
    return getattr(host.original_model, "config", None)


def _positions(cfg: Any) -> str:
    kind = str(cfg.positional_embedding_type)
    return {"standard": "learned"}.get(kind, kind)


def _is_native_attention(attn: Any) -> bool:
    """Whether transformers' own attention runs inside: its pattern then shows up only after z."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    return type(attn) is AttentionBridge


def _windows(config: Any, n_layers: int) -> list[int | None]:
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers if config is not None else []
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return windows or [None] * n_layers


def _bloom_slopes(n_heads: int, device: torch.device) -> Tensor:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    mask = torch.ones(1, 2, device=device)
    return build_alibi_tensor(mask, n_heads, torch.float32)[:, 0, 1]  # type: ignore[no-any-return]


def _neox_hooks(attn: Any, at: str, use_q: Callable[[Tensor], None], use_k: Callable[[Tensor], None]) -> list[Hook]:
    """No rotated hook exists here, so the bridge's own rotation is applied again to what its hooks show."""
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[[Tensor], None]:
        def store(tensor: Tensor) -> None:
            seen[key] = tensor

        return store

    def at_sin(sin: Tensor) -> None:  # fires after q, k and cos
        q, k = (seen.pop(name).transpose(1, 2) for name in ("q", "k"))
        q, k = attn._apply_rotary_pos_emb(q, k, seen.pop("cos"), sin)
        use_q(q.transpose(1, 2))
        use_k(k.transpose(1, 2))

    return [
        (f"{at}.hook_q", keep("q")),
        (f"{at}.hook_k", keep("k")),
        (f"{at}.hook_cos", keep("cos")),
        (f"{at}.hook_sin", at_sin),
    ]


def _gptj_hooks(
    module: Any,
    at: str,
    use_q: Callable[[Tensor], None],
    use_k: Callable[[Tensor], None],
    offset: int,
    positions: Callable[[], Tensor] | None,
) -> list[Hook]:
    """GPT-J rotates inside transformers' own attention; its own function and table are applied again."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    def rotate(tensor: Tensor, where: Tensor) -> Tensor:
        table = module.embed_positions[where.to(module.embed_positions.device)].to(tensor.device)
        sin, cos = table.chunk(2, dim=-1)
        dim = module.rotary_dim
        turned = apply_rotary_pos_emb(tensor[..., :dim], sin, cos)
        return torch.cat([turned, tensor[..., dim:]], dim=-1).to(tensor.dtype)

    return rotated_hooks(at, rotate, use_q, use_k, offset, positions)


def rotated_hooks(
    at: str,
    rotate: Callable[[Tensor, Tensor], Tensor],
    use_q: Callable[[Tensor], None],
    use_k: Callable[[Tensor], None],
    offset: int,
    positions: Callable[[], Tensor] | None,
) -> list[Hook]:
    """Hooks for an attention that rotates inside: ``rotate(tensor, positions)`` does it again to what they show."""

    def rotated(use: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def at_hook(tensor: Tensor) -> None:
            n = tensor.shape[1]
            use(rotate(tensor, torch.arange(offset, offset + n)[None] if positions is None else positions()))

        return at_hook

    return [(f"{at}.hook_q", rotated(use_q)), (f"{at}.hook_k", rotated(use_k))]


def _refuse_unsupported(host: Any, hook_points: Mapping[str, HookPoint], name: str) -> None:
    from transformer_lens.model_bridge.generalized_components.mla_attention import MLAAttentionBridge

    cfg = host.cfg
    owner = f"{name} ({cfg.architecture})"
    config = _config(host)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{owner} is an encoder-decoder; only decoder-only models are supported.")
    if str(cfg.architecture).endswith("ForMaskedLM"):
        raise UnsupportedModelError(f"{owner} is an encoder; only decoder-only models are supported.")
    if "blocks" not in host._modules:
        raise UnsupportedModelError(f"{owner} has no decoder blocks: encoder and other models are not supported.")
    for layer, block in enumerate(host.blocks):
        if "attn" not in block._modules:
            raise UnsupportedModelError(
                f"{owner}: layer {layer} has no attention (state-space and hybrid models are not supported)."
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
    names = [f"blocks.{layer}.attn.hook_{k}" for layer in range(cfg.n_layers) for k in ("in", "q", "k", "v", "z")]
    check_hook_names(hook_points, names, owner=owner)
