"""Where a bridge shows queries and keys as the scores see them, family by family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._host import Positions, Use

# Turns ``[batch, pos, head, d_head]`` to these positions, ``[row, pos]``.
Rotate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class QueryKeyReader:
    """How rotated queries and keys are read.

    Attributes:
        label: as docs/models.md puts it.
        hooks: given the attention bridge, the name it stands at, what to do with q and with k, and positions: the
            hooks that read them.
    """

    label: str
    hooks: Callable[[Any, str, Use, Use, Positions], list[Hook]]


def _plain(_: Any, at: str, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:  # noqa: ARG001
    return [(f"{at}.hook_q", use_q), (f"{at}.hook_k", use_k)]


def _rotated(_: Any, at: str, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:  # noqa: ARG001
    return [(f"{at}.hook_rot_q", use_q), (f"{at}.hook_rot_k", use_k)]


def _neox(attn: Any, at: str, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:  # noqa: ARG001
    """The bridge's own rotation is applied again to what its hooks show."""
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Use:
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


def _gptj(attn: Any, at: str, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:
    """GPT-J rotates inside transformers' own attention; its own function and table are applied again."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    module = attn.original_component

    def rotate(tensor: Tensor, where: Tensor) -> Tensor:
        table = module.embed_positions[where.to(module.embed_positions.device)].to(tensor.device)
        sin, cos = table.chunk(2, dim=-1)
        dim = module.rotary_dim
        turned = apply_rotary_pos_emb(tensor[..., :dim], sin, cos)
        return torch.cat([turned, tensor[..., dim:]], dim=-1).to(tensor.dtype)

    return _turned_again(at, rotate, use_q, use_k, positions)


def _native(attn: Any, at: str, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:
    rotary = attn.original_component.rotary

    def rotate(tensor: Tensor, where: Tensor) -> Tensor:
        return native_rotation(rotary, tensor, where.to(tensor.device))

    return _turned_again(at, rotate, use_q, use_k, positions)


def native_rotation(rotary: Any, tensor: Tensor, positions: Tensor | None) -> Tensor:
    """Turn ``[batch, pos, head, d_head]`` as TransformerLens's own model does; unchanged where `rotary` is None."""
    if rotary is None:
        return tensor
    turned = tensor.transpose(1, 2)
    return rotary.apply_rope(turned, turned, position_ids=positions)[0].transpose(1, 2)  # type: ignore[no-any-return]


def _turned_again(at: str, rotate: Rotate, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:
    """Hooks for an attention that rotates inside: `rotate` does it again to what they show."""

    def turned(use: Use) -> Use:
        def at_hook(tensor: Tensor) -> None:
            where = positions(tensor)
            use(rotate(tensor, where if where.ndim == 2 else where[None]))

        return at_hook

    return [(f"{at}.hook_q", turned(use_q)), (f"{at}.hook_k", turned(use_k))]


PLAIN = QueryKeyReader("hook_q, hook_k", _plain)
ROTATED = QueryKeyReader("hook_rot_q, hook_rot_k", _rotated)
NEOX = QueryKeyReader("rotated again by the bridge's own function", _neox)
GPTJ = QueryKeyReader("rotated again by transformers' own function", _gptj)
NATIVE = QueryKeyReader("hook_q, hook_k, rotated again by its own function", _native)
