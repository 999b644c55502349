"""Forward passes of a bridge: watched, moved to other positions, behind a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.models._info import ModelInfo
from metaopt_lens.models._passes import HostPass, PastKeysValues
from metaopt_lens.models._prefix import Prefix


@contextmanager
def watching(model: Any, info: ModelInfo, begin: Callable[[HostPass], Tensor | None]) -> Iterator[None]:
    """Call `begin` before every pass of the model inside a bridge; positions it returns are given to the model.

    Args:
        model: what is inside the bridge.
        info: names it in errors.
        begin: see `Host.watching`.
    """
    takes_positions = "position_ids" in signature(model.forward).parameters

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
