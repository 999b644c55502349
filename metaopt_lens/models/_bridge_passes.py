"""Forward passes of a bridge: watched, moved to other positions, behind a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.models._info import ModelInfo
from metaopt_lens.models._passes import HostPass, PastKeysValues
from metaopt_lens.models._prefix import Prefix


@contextmanager
def watching(
    model: Any, info: ModelInfo, begin: Callable[[HostPass], Tensor | None], *, forgets: bool = False
) -> Iterator[None]:
    """Call `begin` before every pass of the model inside a bridge; positions it returns are given to the model.

    Args:
        model: what is inside the bridge.
        info: names it in errors.
        begin: see `Host.watching`.
        forgets: whether the bridge ignores a cache; see `forgets_cache`.
    """
    takes_positions = "position_ids" in signature(model.forward).parameters

    def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = args[0] if args else options.get("input_ids")
        source = options["inputs_embeds"] if tokens is None else tokens
        cache = options.get("past_key_values")
        n_past = 0 if cache is None else int(cache.get_seq_length())
        if forgets and cache is not None and n_past == 0:  # filled only by us; see `reminded`
            raise UnsupportedModelError(
                f"{info.name} ({info.architecture}): its bridge ignores the cache in this TransformerLens, so that "
                "cached passes see no earlier token. Run without a cache (use_past_kv_cache=False), or install "
                "transformer-lens>=4."
            )
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
        if not takes_positions and info.positions not in {"alibi", "none"}:
            raise UnsupportedModelError(
                f"{info.name} ({info.architecture}) takes no position_ids, so a zero-shot prompt's "
                "tokens cannot be put where they stand in context. Run them behind the demonstrations' cache instead: "
                "MetaGradient.run(model, tokens)."
            )
        # With the mask given, transformers does not take the gap in position_ids for packed sequences.
        changed = {**options, "attention_mask": mask}
        if takes_positions:
            changed["position_ids"] = moved[:, n_past:]
        return args, changed

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def cache_of(prefix: Prefix, batch: int) -> Any:
    """A transformers cache that holds a prefix for every sequence of a batch."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()  # without a config: with one, sliding layers drop keys
    for layer in zip(prefix.k, prefix.v, strict=True):
        k, v = (t.transpose(0, 1).expand(batch, -1, -1, -1) for t in layer)
        held = DynamicLayer()
        v = v.to(k.dtype)  # OLMo-2's rotary promotes keys, and the host's own cache then takes values along
        held.lazy_initialization(k, v)
        held.keys, held.values = k, v  # views: `update` would copy them for every sequence
        cache.layers.append(held)
    return cache


def forgets_cache(attention: Any) -> bool:
    """Whether an attention ignores the cache it is given (MPT under TransformerLens 3.9)."""
    from transformer_lens.model_bridge.generalized_components import ALiBiJointQKVAttentionBridge

    if not isinstance(attention, ALiBiJointQKVAttentionBridge):
        return False
    return "_update_kv_cache" not in type(attention)._reconstruct_attention.__code__.co_names


@contextmanager
def reminded(attentions: Sequence[Any], prefix: Prefix) -> Iterator[None]:
    """Within it attentions that forget the cache see a prefix: its keys and values stand before the new tokens'.

    Args:
        attentions: of every layer.
        prefix: what they are to see.
    """
    with ExitStack() as stack:
        for attention, k, v in zip(attentions, prefix.k, prefix.v, strict=True):
            if forgets_cache(attention):
                stack.enter_context(_reminded(attention, k, v))
        yield


@contextmanager
def _reminded(attention: Any, past_k: Tensor, past_v: Tensor) -> Iterator[None]:
    to_heads = attention._reshape_qkv_to_heads

    def reshape(*args: Any) -> tuple[Any, ...]:
        q, k, v, *sizes = to_heads(*args)
        k, v = (
            torch.cat([past.to(new).transpose(0, 1).expand(len(new), -1, -1, -1), new], dim=2)  # [batch, head, pos, d]
            for past, new in ((past_k, k), (past_v, v))
        )
        return (q, k, v, *sizes)

    vars(attention)["_reshape_qkv_to_heads"] = reshape
    try:
        yield
    finally:
        del vars(attention)["_reshape_qkv_to_heads"]  # the class's own again


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
