"""TransformerLens's own model behind a bridge, ``TransformerBridge.boot_native``: no transformers model, no cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt_lens.dual import attention_scores, softmax_with_sink, weighted_values
from metaopt_lens.models._bridge import bridge_head, read_bridge
from metaopt_lens.models._bridge_block import BridgeBlock
from metaopt_lens.models._bridge_passes import cache_of, watching
from metaopt_lens.models._hooks import StopForward
from metaopt_lens.models._output_head import OutputHead
from metaopt_lens.models._passes import HostPass
from metaopt_lens.models._prefix import Prefix
from metaopt_lens.models._rotation import native_rotation

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

ARCHITECTURE = "TransformerLensNative"


class NativeHost:
    """A native bridge. It has no cache: behind a prefix its attention is computed by our own formulas."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hook_points: Mapping[str, HookPoint] = dict(model.hook_dict)
        self.info, self.blocks, self._family = read_bridge(model, self.hook_points)

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        return self.model, self.model.original_model

    def head(self) -> OutputHead:
        return bridge_head(self.model, self._family)

    def forward(self, tokens: Tensor, prefix: Prefix | None) -> Tensor:
        if prefix is None:
            return self.model(tokens)  # type: ignore[no-any-return]
        n_past = prefix.n_tokens
        where = torch.arange(n_past, n_past + tokens.shape[1], device=tokens.device).expand(tokens.shape)
        with ExitStack() as stack:
            for block, k, v in zip(self.blocks, prefix.k, prefix.v, strict=True):
                stack.enter_context(_attending_to(block, k, v))
            # The host itself ignores the cache; whoever watches the pass reads past keys and values from it.
            cache = cache_of(prefix, tokens.shape[0])
            return self.model(tokens, past_key_values=cache, position_ids=where)  # type: ignore[no-any-return]

    def fill(self, tokens: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        with suppress(StopForward):
            self.model(tokens)
        return tuple

    def watching(self, begin: Callable[[HostPass], Tensor | None]) -> AbstractContextManager[None]:
        return watching(self.model.original_model, self.info, begin)


@contextmanager
def _attending_to(block: BridgeBlock, past_k: Tensor, past_v: Tensor) -> Iterator[None]:
    module, rule, n_past = block.block.attn.original_component, block.rule(), past_k.shape[0]

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (getattr(module, name)(hidden_states).unflatten(-1, (-1, block.d_head)) for name in ("q", "k", "v"))
        q, k = (native_rotation(module.rotary, t, position_ids) for t in (q, k))
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
