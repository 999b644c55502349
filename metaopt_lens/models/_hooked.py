"""`HookedTransformer` of TransformerLens 3.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.dual import ScoreRule
from metaopt_lens.models._abstract import AttentionModel, ModelInfo, Prefix, dtype_name, refuse_blocks
from metaopt_lens.models._hooks import Hook, StopForward
from metaopt_lens.models._mlp import MlpSite
from metaopt_lens.models._passes import HostPass
from metaopt_lens.models._processing import processing_of

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformers import PreTrainedTokenizerBase

_POSITIONS = {"standard": "learned", "rotary": "rotary", "alibi": "alibi", "none": "none"}
_NORMALISATIONS = {"LN", "LNPre", "RMS", "RMSPre", None}
_POST_NORM = {"Olmo2ForCausalLM", "Olmo3ForCausalLM"}


class HookedModel(AttentionModel):
    """A wrapped `HookedTransformer`."""

    def __init__(self, host: Any) -> None:
        cfg = host.cfg
        _refuse_unsupported(cfg)
        self.host = host
        blocks = list(host.blocks)
        self.info = ModelInfo(
            name=str(cfg.model_name),
            host="HookedTransformer",
            architecture=str(cfg.original_architecture or "HookedTransformer"),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            dtype=dtype_name(blocks[0].attn.W_Q.dtype),
            positions=_POSITIONS[cfg.positional_embedding_type],
            processing=processing_of(
                host_says=cfg.normalization_type in {"LNPre", "RMSPre"},
                gains=[_gain(block.ln1, cfg) for block in blocks],
                projections=lambda: [_projections(block.attn, cfg) for block in blocks],
                value_biases=[block.attn.b_V for block in blocks],
                output_biases=[block.attn.b_O for block in blocks],
            ),
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.host.tokenizer

    @property
    def device(self) -> torch.device:
        return self.host.W_E.device  # type: ignore[no-any-return]

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        return (self.host,)

    @property
    def hook_points(self) -> Mapping[str, HookPoint]:
        return self.host.hook_dict  # type: ignore[no-any-return]

    @property
    def pattern_before_z(self) -> bool:
        return True

    def _attn(self, layer: int) -> Any:
        return self.host.blocks[layer].attn

    def score_rule(self, layer: int) -> ScoreRule:
        cfg, attn = self.host.cfg, self._attn(layer)
        slopes = None
        if self.info.positions == "alibi":
            slopes = attn.create_alibi_multipliers(cfg.n_heads, self.device).flatten()
        return ScoreRule(
            scale=1.0 / float(attn.attn_scale),
            softcap=float(cfg.attn_scores_soft_cap) if cfg.attn_scores_soft_cap > 0 else None,
            window=int(cfg.window_size) if attn.attn_type == "local" else None,
            alibi_slopes=slopes,
            sinks=attn.sinks if cfg.use_attention_sinks else None,
        )

    def w_o(self, layer: int) -> Tensor:
        return self._attn(layer).W_O  # type: ignore[no-any-return]

    def b_o(self, layer: int) -> Tensor | None:
        return self._attn(layer).b_O  # type: ignore[no-any-return]

    def has_bias(self, projection: str, layer: int) -> bool:  # noqa: ARG002 - a HookedTransformer has them all
        return True

    def residual_hook(self, end: str, layer: int) -> str:
        return f"blocks.{layer}.hook_resid_{end}"

    def early_exit(self, residual: Tensor) -> Tensor:
        logits: Tensor = self.host.unembed(self.host.ln_final(residual))
        cap = self.host.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def hook_name(self, kind: str, layer: int) -> str:
        if kind == "attn_out":
            if self.host.cfg.use_normalization_before_and_after or self.info.architecture in _POST_NORM:
                raise UnsupportedModelError(
                    f"{self.info.name} normalises the attention output before the hook that shows it."
                )
            return f"blocks.{layer}.hook_attn_out"
        return f"blocks.{layer}.attn.hook_{kind}"

    def attention_input_hook(self, layer: int, use: Callable[[Tensor], None]) -> Hook:
        # ln1 runs once each for q, k and v, so its hook fires three times with the same value.
        if self.info.architecture in _POST_NORM:
            return f"blocks.{layer}.hook_resid_pre", use
        return self._normed_hook(layer, "ln1", "pre", use)

    def _normed_hook(self, layer: int, norm: str, residual: str, use: Callable[[Tensor], None]) -> Hook:
        """A hook on the output of a norm, which HookedTransformer shows before its weight and bias only."""
        module = getattr(self.host.blocks[layer], norm)
        kind = self.host.cfg.normalization_type
        if kind is None:
            return f"blocks.{layer}.hook_resid_{residual}", use

        def scaled(normalized: Tensor) -> None:
            x = normalized
            if kind in {"LN", "RMS"}:
                x = x * module.w
            if kind == "LN":
                x = x + module.b
            use(x)

        return f"blocks.{layer}.{norm}.hook_normalized", scaled

    def mlp_site(self, layer: int) -> MlpSite:
        cfg = self.host.cfg
        refuse_blocks(
            self.info.name,
            {
                "it is attention-only": cfg.attn_only,
                "attention and MLP run in parallel": cfg.parallel_attn_mlp,
                "the MLP is a mixture of experts": cfg.num_experts is not None,
                "the MLP's output is normalised": cfg.use_normalization_before_and_after
                or self.info.architecture in _POST_NORM,
            },
        )
        mlp, at = self.host.blocks[layer].mlp, f"blocks.{layer}.mlp"
        if cfg.gated_mlp:
            matrices = {"in": mlp.W_in.mT, "gate": mlp.W_gate.mT}
            products = {"in": f"{at}.hook_pre_linear", "gate": f"{at}.hook_pre"}
        else:
            matrices, products = {"in": mlp.W_in.mT}, {"in": f"{at}.hook_pre"}
        return MlpSite(
            input_hook=lambda use: self._normed_hook(layer, "ln2", "mid", use),
            matrices=matrices,
            products=products,
            out_name=f"blocks.{layer}.hook_mlp_out",
        )

    def query_key_hooks(
        self,
        layer: int,
        use_q: Callable[[Tensor], None],
        use_k: Callable[[Tensor], None],
        *,
        offset: int,
        positions: Callable[[], Tensor] | None = None,  # noqa: ARG002 - the host's own rotation is read
    ) -> list[Hook]:
        def new_keys(k: Tensor) -> None:
            use_k(k[:, offset:])  # under a cache hook_rot_k shows the cached keys too

        at = f"blocks.{layer}.attn"
        if self.info.positions == "rotary":
            return [(f"{at}.hook_rot_q", use_q), (f"{at}.hook_rot_k", new_keys)]
        return [(f"{at}.hook_q", use_q), (f"{at}.hook_k", use_k)]

    def _run_host(self, tokens: Tensor, cache: Any) -> Tensor:
        alibi = [block.attn.alibi for block in self.host.blocks] if self.info.positions == "alibi" else []
        mask = torch.ones_like(tokens)  # without it the host guesses padding from the tokens
        try:
            for block, _ in zip(self.host.blocks, alibi, strict=False):
                block.attn.alibi = None  # one cached from a longer run would shift all scores
            return self.host(tokens, past_kv_cache=cache, attention_mask=mask)  # type: ignore[no-any-return]
        finally:
            for block, bias in zip(self.host.blocks, alibi, strict=False):
                block.attn.alibi = bias

    def _cache(self, batch: int, prefix: Prefix | None) -> Any:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self.host.cfg, self.device, batch)
        if prefix is not None:
            for entry, k, v in zip(cache.entries, prefix.host_k, prefix.v, strict=True):
                entry.past_keys = k.expand(batch, -1, -1, -1)
                entry.past_values = v.expand(batch, -1, -1, -1)
            ones = torch.ones(batch, prefix.n_tokens, dtype=torch.int, device=self.device)
            cache.previous_attention_mask = ones
            cache.freeze()
        return cache

    def _forward(self, tokens: Tensor, prefix: Prefix | None) -> Tensor:
        cache = None if prefix is None else self._cache(tokens.shape[0], prefix)
        return self._run_host(tokens, cache)

    def _forward_prefix(self, tokens: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        # Only with rotary positions does the cache hold other keys than the scores see.
        cache = self._cache(1, None) if self.info.positions == "rotary" else None
        with suppress(StopForward):
            self._run_host(tokens, cache)
        return tuple if cache is None else (lambda: tuple(entry.past_keys[0] for entry in cache.entries))

    def _refuse_immovable(self) -> None:
        pass  # learned positions and rotations are replaced at their hooks; ALiBi scores are computed anew

    @contextmanager
    def _watching(self, begin: Callable[[HostPass], Tensor | None]) -> Iterator[None]:
        # generate() calls forward directly, so the parts are watched: embedding, positions (if learned), blocks.
        tokens: list[Tensor] = []
        entries: dict[int, Any] = {}
        begun: list[bool] = []
        blocks = list(self.host.blocks)

        def start(batch: int, n_new: int, n_past: int, mask: Tensor | None) -> None:
            shape = (batch, n_past + n_new)
            valid = torch.ones(shape, dtype=torch.bool, device=self.device) if mask is None else mask.bool()
            new = tokens.pop() if tokens and tokens[-1].shape == (batch, n_new) else None
            tokens.clear()
            entries.clear()
            begin(HostPass(tokens=new, valid=valid, n_past=n_past, past=lambda layer: entries[layer]))

        def at_embed(_: Any, args: tuple[Any, ...]) -> None:
            tokens[:] = [args[0]]

        def at_positions(_: Any, args: tuple[Any, ...]) -> None:
            sequence, n_past, mask = args
            n_all = n_past + sequence.shape[1] if mask is None else mask.shape[1]
            start(sequence.shape[0], n_all - n_past, n_past, mask)
            begun[:] = [True]

        def at_attention(layer: int) -> Callable[..., None]:
            def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:  # noqa: ARG001
                entry = options.get("past_kv_cache_entry")
                n_past = 0 if entry is None else entry.past_keys.shape[1]
                if layer == 0:
                    if not begun:
                        batch, n_new = options["query_input"].shape[:2]
                        start(batch, n_new, n_past, options.get("attention_mask"))
                    begun.clear()
                rotary = self.info.positions == "rotary"
                cached = (None, None) if entry is None else (None if rotary else entry.past_keys, entry.past_values)
                entries[layer] = cached

            return before

        handles = [self.host.embed.register_forward_pre_hook(at_embed)]
        if self.info.positions == "learned":
            handles.append(self.host.pos_embed.register_forward_pre_hook(at_positions))
        for layer, block in enumerate(blocks):
            handles.append(block.attn.register_forward_pre_hook(at_attention(layer), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _move_hooks(self, current: Callable[[], tuple[HostPass, Tensor | None]]) -> list[Hook]:
        if self.info.positions == "learned":

            def embed(out: Tensor) -> Tensor | None:
                _, moved = current()
                return None if moved is None else self.host.pos_embed.W_pos[moved[:, -out.shape[1] :]].to(out)

            return [("hook_pos_embed", embed)]
        if self.info.positions != "rotary":
            return []

        def turn(attn: Any) -> Callable[[Tensor], Tensor | None]:
            def rotate(tensor: Tensor) -> Tensor | None:
                host_pass, moved = current()
                if moved is None:
                    return None
                # Rotations add up: what the host turned by its own index is turned on by the rest of the way.
                more = (moved - host_pass.index)[:, -tensor.shape[1] :].to(attn.rotary_cos.device)
                n = attn.cfg.rotary_dim
                cos, sin = (table[more].unsqueeze(2).to(tensor) for table in (attn.rotary_cos, attn.rotary_sin))
                turned = tensor[..., :n] * cos + attn.rotate_every_two(tensor[..., :n]) * sin
                return torch.cat([turned, tensor[..., n:]], dim=-1)

            return rotate

        return [
            (f"blocks.{layer}.attn.hook_rot_{kind}", turn(block.attn))
            for layer, block in enumerate(self.host.blocks)
            for kind in ("q", "k")
        ]


def _gain(norm: Any, cfg: Any) -> Tensor | None:
    """The factor a norm puts on its normalised input; folded norms have none left, which is 1."""
    if cfg.normalization_type is None:
        return None
    return norm.w if cfg.normalization_type in {"LN", "RMS"} else torch.ones(1)


def _projections(attn: Any, cfg: Any) -> list[Tensor]:
    """Query, key and value matrices, ``[d_model, (head d_head)]``."""
    grouped = cfg.n_key_value_heads is not None
    k, v = (attn._W_K, attn._W_V) if grouped else (attn.W_K, attn.W_V)
    return [w.transpose(0, 1).flatten(1) for w in (attn.W_Q, k, v)]


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
