"""Forward passes of a `HookedTransformer`: watched, moved to other positions, behind a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metaopt_lens.models._hooks import Hook, attached
from metaopt_lens.models._passes import HostPass
from metaopt_lens.models._prefix import Prefix

Current = Callable[[], tuple[HostPass, Tensor | None]]


@contextmanager
def watching(model: Any, begin: Callable[[HostPass], Tensor | None]) -> Iterator[None]:
    """Call `begin` before every pass; tokens are moved to the positions it returns, at embedding or rotation.

    generate() calls forward directly, so the parts are watched: embedding, positions (if learned), attention.

    Args:
        model: the HookedTransformer.
        begin: see `Host.watching`.
    """
    positions = model.cfg.positional_embedding_type
    device = model.W_E.device
    running: list[tuple[HostPass, Tensor | None]] = []
    tokens: list[Tensor] = []
    seen: list[int] = []  # layers whose attention has been reached in this pass
    entries: dict[int, Any] = {}
    begun: list[bool] = []

    def start(batch: int, n_new: int, n_past: int, mask: Tensor | None) -> None:
        shape = (batch, n_past + n_new)
        valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
        new = tokens.pop() if tokens and tokens[-1].shape == (batch, n_new) else None
        tokens.clear()
        entries.clear()
        host_pass = HostPass(tokens=new, valid=valid, n_past=n_past, past=lambda layer: entries[layer])
        running[:] = [(host_pass, begin(host_pass))]

    def at_embed(_: Any, args: tuple[Any, ...]) -> None:
        tokens[:] = [args[0]]
        begun.clear()
        seen.clear()

    def at_positions(_: Any, args: tuple[Any, ...]) -> None:
        sequence, n_past, mask = args
        n_all = n_past + sequence.shape[1] if mask is None else mask.shape[1]
        start(sequence.shape[0], n_all - n_past, n_past, mask)
        begun[:] = [True]

    def at_attention(layer: int) -> Callable[..., None]:
        def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:  # noqa: ARG001
            entry = options.get("past_kv_cache_entry")
            n_past = 0 if entry is None else entry.past_keys.shape[1]
            if layer in seen:  # another pass, whose tokens nobody embedded
                begun.clear()
                seen.clear()
            seen.append(layer)
            if not begun:
                batch, n_new = options["query_input"].shape[:2]
                start(batch, n_new, n_past, options.get("attention_mask"))
                begun[:] = [True]
            if entry is None:
                entries[layer] = (None, None)
            else:
                entries[layer] = (None if positions == "rotary" else entry.past_keys, entry.past_values)

        return before

    handles = [model.embed.register_forward_pre_hook(at_embed)]
    if positions == "standard":
        handles.append(model.pos_embed.register_forward_pre_hook(at_positions))
    for layer, block in enumerate(model.blocks):
        handles.append(block.attn.register_forward_pre_hook(at_attention(layer), with_kwargs=True))
    try:
        with attached(model.hook_dict, _moves(model, lambda: running[0])):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _moves(model: Any, current: Current) -> list[Hook]:
    """Hooks that move tokens to the positions of the running pass; ALiBi scores are recomputed at z."""
    if model.cfg.positional_embedding_type == "standard":

        def embed(out: Tensor) -> Tensor | None:
            _, moved = current()
            return None if moved is None else model.pos_embed.W_pos[moved[:, -out.shape[1] :]].to(out)

        return [("hook_pos_embed", embed)]
    if model.cfg.positional_embedding_type != "rotary":
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
        for layer, block in enumerate(model.blocks)
        for kind in ("q", "k")
    ]


def run(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """One pass whose ALiBi bias and padding mask are those of these tokens."""
    alibi = [block.attn.alibi for block in model.blocks] if model.cfg.positional_embedding_type == "alibi" else []
    mask = torch.ones_like(tokens)  # without it the host guesses padding from the tokens
    try:
        for block, _ in zip(model.blocks, alibi, strict=False):
            block.attn.alibi = None  # one cached from a longer run would shift all scores
        return model(tokens, past_kv_cache=cache, attention_mask=mask)  # type: ignore[no-any-return]
    finally:
        for block, bias in zip(model.blocks, alibi, strict=False):
            block.attn.alibi = bias


def cache_of(model: Any, prefix: Prefix | None, batch: int) -> Any:
    """TransformerLens's cache, empty and growing, or holding a prefix for every sequence of a batch."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    device = model.W_E.device
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, batch)
    if prefix is not None:
        for entry, k, v in zip(cache.entries, prefix.host_k, prefix.v, strict=True):
            entry.past_keys = k.expand(batch, -1, -1, -1)
            entry.past_values = v.expand(batch, -1, -1, -1)
        cache.previous_attention_mask = torch.ones(batch, prefix.n_tokens, dtype=torch.int, device=device)
        cache.freeze()
    return cache
