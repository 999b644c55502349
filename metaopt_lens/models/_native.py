"""TransformerLens's own model behind a bridge, ``TransformerBridge.boot_native``: no transformers model, no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from metaopt_lens.dual import ScoreRule, attention_scores, softmax_with_sink, weighted_values
from metaopt_lens.models._abstract import Prefix
from metaopt_lens.models._bridge import BridgeModel, rotated_hooks
from metaopt_lens.models._hooks import Hook

ARCHITECTURE = "TransformerLensNative"


class NativeBridgeModel(BridgeModel):
    """A wrapped native bridge. It has no cache: behind a prefix its attention is computed by our own formulas."""

    def _component(self, layer: int) -> Any:
        return self._attn(layer).original_component

    def score_rule(self, layer: int) -> ScoreRule:
        module = self._component(layer)
        return ScoreRule(scale=1.0 / float(module.scale), softcap=_enabled(module.attn_scores_soft_cap))

    def _logit_cap(self) -> float | None:
        return _enabled(self.host.original_model.output_logits_soft_cap)

    def query_key_hooks(
        self,
        layer: int,
        use_q: Callable[[Tensor], None],
        use_k: Callable[[Tensor], None],
        *,
        offset: int,
        positions: Callable[[], Tensor] | None = None,
    ) -> list[Hook]:
        rotary = self._component(layer).rotary

        def rotate(tensor: Tensor, where: Tensor) -> Tensor:
            return _rotated(rotary, tensor, where.to(tensor.device))

        return rotated_hooks(f"blocks.{layer}.attn", rotate, use_q, use_k, offset, positions)

    def _forward(self, tokens: Tensor, prefix: Prefix | None) -> Tensor:
        if prefix is None:
            return self.host(tokens)  # type: ignore[no-any-return]
        n_past = prefix.k[0].shape[0]
        where = torch.arange(n_past, n_past + tokens.shape[1], device=tokens.device).expand(tokens.shape)
        with ExitStack() as stack:
            for layer, (k, v) in enumerate(zip(prefix.k, prefix.v, strict=True)):
                stack.enter_context(self._attending_to(layer, k, v))
            # The host itself ignores the cache; whoever watches the pass reads past keys and values from it.
            cache = self._cache(tokens.shape[0], prefix)
            return self.host(tokens, past_key_values=cache, position_ids=where)  # type: ignore[no-any-return]

    @contextmanager
    def _attending_to(self, layer: int, past_k: Tensor, past_v: Tensor) -> Iterator[None]:
        module, rule, n_past = self._component(layer), self.score_rule(layer), past_k.shape[0]

        def forward(
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            **_: Any,
        ) -> tuple[Tensor, Tensor]:
            q, k, v = (
                getattr(module, name)(hidden_states).unflatten(-1, (-1, self.info.d_head)) for name in ("q", "k", "v")
            )
            q, k = (_rotated(module.rotary, t, position_ids) for t in (q, k))
            k, v = (
                torch.cat([past.to(new).expand(len(new), -1, -1, -1), new], dim=1)
                for past, new in ((past_k, k), (past_v, v))
            )
            src = torch.arange(k.shape[1], device=k.device)
            scores = attention_scores(rule, q, k, dst_positions=src[n_past:], src_positions=src)
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask.bool()[:, None, None], -torch.inf)
            pattern = softmax_with_sink(scores, None)[0].to(hidden_states.dtype)
            return module.o(weighted_values(pattern, v).to(hidden_states.dtype).flatten(-2)), pattern

        module.forward = forward
        try:
            yield
        finally:
            del module.forward  # the class's own again


def _enabled(cap: Any) -> float | None:
    return float(cap) if cap > 0 else None  # -1 says none


def _rotated(rotary: Any, tensor: Tensor, positions: Tensor | None) -> Tensor:
    if rotary is None:
        return tensor
    turned = tensor.transpose(1, 2)
    return rotary.apply_rope(turned, turned, position_ids=positions)[0].transpose(1, 2)  # type: ignore[no-any-return]
