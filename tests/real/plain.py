"""The pretrained model in plain transformers, read from the GGUF file itself: oracles that use none of our code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """What every layer's attention did with one prompt."""

    z: Tensor  # [layer, pos, head, d_head]
    pattern: Tensor  # [layer, head, dst, src]
    v: Tensor  # [layer, pos, head, d_head], key-value heads repeated


class Plain:
    """A transformers model with eager attention."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.n_kv_heads, self.d_head = config.num_key_value_heads, config.head_dim
        self.layers = model.model.layers

    @property
    def pass_units(self) -> float:
        """Units of rounding of a pass: six steps a layer of four units each; those of the layers add like a walk."""
        return 6 * 4 * math.sqrt(self.n_layers)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """``[pos, d_vocab]``."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(ids)])).logits[0].clone()

    def attention(self, ids: Sequence[int]) -> Attention:
        """From forward hooks on the model's own projections."""
        z: list[Tensor] = []
        v: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in self.layers:
                attn = layer.self_attn
                hooks.enter_context(_removed(attn.o_proj.register_forward_pre_hook(lambda _, x: z.append(x[0][0]))))
                hooks.enter_context(_removed(attn.v_proj.register_forward_hook(lambda _, __, y: v.append(y[0]))))
            with torch.no_grad():
                out = self.model(torch.tensor([list(ids)]), output_attentions=True)
        group = self.n_heads // self.n_kv_heads
        values = torch.stack(v).unflatten(-1, (self.n_kv_heads, self.d_head)).repeat_interleave(group, dim=2)
        return Attention(
            z=torch.stack(z).unflatten(-1, (self.n_heads, self.d_head)),
            pattern=torch.stack([layer[0] for layer in out.attentions]),
            v=values,
        )

    @contextmanager
    def hidden(self, queries: slice, sources: slice, heads: set[tuple[int, int]] | None = None) -> Iterator[None]:
        """Scores from `queries` to `sources` are -inf in the heads given as (layer, head); in all if None."""

        def edit(index: int) -> Any:
            chosen = [h for h in range(self.n_heads) if heads is None or (index, h) in heads]

            def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
                mask = kwargs["attention_mask"].expand(-1, self.n_heads, -1, -1).clone()
                for head in chosen:
                    mask[:, head, queries, sources] = torch.finfo(mask.dtype).min
                return args, {**kwargs, "attention_mask": mask}

            return hook

        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                handle = layer.self_attn.register_forward_pre_hook(edit(index), with_kwargs=True)
                hooks.enter_context(_removed(handle))
            yield

    def early_exits(self, ids: Sequence[int]) -> list[Tensor]:
        """Logits ``[pos, d_vocab]`` of every block's output through the final norm and the unembedding."""
        blocks: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(_removed(layer.register_forward_hook(lambda _, __, y: blocks.append(first(y)))))
            with torch.no_grad():
                self.model(torch.tensor([list(ids)]))
                return [self.model.lm_head(self.model.model.norm(block))[0] for block in blocks]


def first(output: Any) -> Tensor:
    """A block's output, which older versions wrap in a tuple."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
