"""The host's own projection weights, trained or changed in place: oracles that use no hook and none of our code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from hosts import build_apart
from torch import Tensor, nn

Example = tuple[list[int], list[int]]  # token ids, and the indices of the tokens whose prediction counts

View = Callable[[Tensor], Tensor]
_FUSED = {
    "gpt2": "equal",
    "mpt": "equal",
    "gpt_bigcode": "multi-query",
    "falcon": "multi-query",
    "gpt_neox": "interleaved",
    "gpt_neox_sequential": "interleaved",
    "bloom": "interleaved",
}


def example(words: str, *, n_label: int | None = None) -> Example:
    """A demonstration behind BOS; all tokens are learned, or the last `n_label`."""
    ids = [1] + [3 if word == ":" else int(word[1:]) for word in words.split()]
    first = 1 if n_label is None else len(ids) - n_label
    return ids, list(range(first, len(ids)))


class OwnParameters:
    """A model apart from the one under test, with the same weights; q, k, v, o of every layer can be read and written.

    `name` is as in `hosts.HOST_NAMES`: behind ``bridge:`` and ``native:`` it is the model itself, no bridge in between.
    """

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float64) -> None:
        self.name, (self.kind, self.family) = name, name.split(":")
        self.model: Any = build_apart(name, dtype=dtype)
        if self.kind == "bridge":
            cfg = self.model.config
            self.n_layers, self.n_heads = cfg.num_hidden_layers, cfg.num_attention_heads
            self.d_head = getattr(cfg, "head_dim", None) or cfg.hidden_size // self.n_heads
        else:
            cfg = self.model.cfg
            self.n_layers, self.n_heads, self.d_head = cfg.n_layers, cfg.n_heads, cfg.d_head

    def copy(self) -> OwnParameters:
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        return other

    def logits(self, ids: Sequence[int]) -> Tensor:
        out = self.model(torch.tensor([list(ids)]))
        return getattr(out, "logits", out)[0]

    # ---- where the projections are ------------------------------------------------------------------------------

    def attention(self, layer: int) -> Any:
        names = ("attn", "self_attn", "self_attention", "attention")
        attn = next(getattr(self.blocks()[layer], n) for n in names if hasattr(self.blocks()[layer], n))
        return attn.attention if self.family == "gpt_neo" and self.kind == "bridge" else attn

    def blocks(self) -> Any:
        if self.kind == "hooked":
            return self.model.blocks
        if self.kind == "native":
            return self.model.layers
        return self._first(
            "transformer.h", "transformer.blocks", "model.layers", "gpt_neox.layers", "model.decoder.layers"
        )

    def unembed(self, residual: Tensor) -> Tensor:
        """Final norm, unembedding and soft-cap."""
        if self.kind == "hooked":
            return self.model.unembed(self.model.ln_final(residual))  # type: ignore[no-any-return]
        if self.kind == "native":
            logits: Tensor = self.model.head(self.model.ln_out(residual))
            cap = self.model.output_logits_soft_cap
            return cap * torch.tanh(logits / cap) if cap > 0 else logits
        norm = self._first("transformer.ln_f", "transformer.norm_f", "model.norm", "gpt_neox.final_layer_norm")
        logits = self.model.get_output_embeddings()(norm(residual))
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _first(self, *paths: str) -> Any:
        for path in paths:
            with suppress(AttributeError):
                return self.model.get_submodule(path)
        raise AssertionError(self.family)

    def parameter(self, layer: int, projection: str, kind: str) -> tuple[nn.Parameter, View] | None:
        """The parameter that holds a projection's weight (``w``) or bias (``b``), and a view of its own entries in it:
        ``[head, d_model, d_head]`` and ``[head, d_head]`` (o: ``[head, d_head, d_model]`` and ``[d_model]``).
        """
        attn = self.attention(layer)
        if self.kind == "hooked":
            prefix = "_" if projection in "kv" and self.model.cfg.n_key_value_heads else ""
            letter = kind.upper() if kind == "w" else kind
            return getattr(attn, f"{prefix}{letter}_{projection.upper()}"), _whole
        module, outputs = self._module(attn, projection)
        parameter = module.weight if kind == "w" else module.bias
        if parameter is None:
            return None
        if kind == "b":
            return parameter, _whole if projection == "o" else outputs
        is_conv = type(module).__name__ == "Conv1D"  # [in, out]; a Linear has [out, in]

        def view(t: Tensor) -> Tensor:
            out_in = t.T if is_conv else t
            if projection == "o":
                return out_in.T.unflatten(0, (self.n_heads, self.d_head))
            return outputs(out_in).transpose(1, 2)

        return parameter, view

    def _module(self, attn: Any, projection: str) -> tuple[Any, View]:
        """The linear layer, and a view of the outputs that are the projection's: ``[head, d_head, ...]``."""
        if self.kind == "native":
            return getattr(attn, projection), lambda t: t.unflatten(0, (-1, self.d_head))
        if projection == "o":
            names = ("o_proj", "c_proj", "dense", "out_proj")
            return next(getattr(attn, n) for n in names if hasattr(attn, n)), _whole
        layout, d = _FUSED.get(self.family), self.d_head
        if layout is None:
            return getattr(attn, f"{projection}_proj"), lambda t: t.unflatten(0, (-1, d))
        index = "qkv".index(projection)
        if layout == "interleaved":  # [head, (q, k, v), d_head]
            return attn.query_key_value, lambda t: t.unflatten(0, (self.n_heads, 3, d))[:, index]
        width = self.n_heads * d
        kv = width if layout == "equal" else d  # multi-query: one key and one value head behind the queries
        start = (0, width, width + kv)[index]
        stop = (width, width + kv, width + 2 * kv)[index]
        names = ("c_attn", "Wqkv", "query_key_value")
        fused = next(getattr(attn, n) for n in names if hasattr(attn, n))
        return fused, lambda t: t[start:stop].unflatten(0, (-1, d))

    def read(self, projection: str, kind: str = "w") -> Tensor | None:
        """All layers' weights or biases of a projection; None where there are none."""
        found = [self.parameter(layer, projection, kind) for layer in range(self.n_layers)]
        if None in found:
            return None
        return torch.stack([view(p.detach()).clone() for p, view in found])  # type: ignore[misc]

    def add_(self, layer: int, projection: str, kind: str, change: Tensor) -> None:
        found = self.parameter(layer, projection, kind)
        assert found is not None
        parameter, view = found
        with torch.no_grad():
            view(parameter).add_(change.to(parameter.dtype))

    # ---- training -----------------------------------------------------------------------------------------------

    def train(
        self,
        batches: Sequence[Sequence[Example]],
        *,
        projections: Sequence[str] = ("k", "v"),
        bias: bool = True,
        optimizer: Any = torch.optim.SGD,
        after_step: Callable[[int], None] | None = None,
        loss: Callable[[OwnParameters, Example], Tensor] | None = None,
        **options: Any,
    ) -> list[float]:
        """Train these projections' own parameters with a torch optimiser; the losses before each step."""
        masks: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for layer in range(self.n_layers):
            for projection in projections:
                for kind in ("w", "b") if bias else ("w",):
                    found = self.parameter(layer, projection, kind)
                    if found is None:
                        continue
                    parameter, view = found
                    _, mask = masks.setdefault(id(parameter), (parameter, torch.zeros_like(parameter)))
                    view(mask).fill_(1.0)
        parameters = [parameter for parameter, _ in masks.values()]
        stepper = optimizer(parameters, **options)
        losses = []
        for number, batch in enumerate(batches):
            value = torch.stack([(loss or ordinary)(self, one) for one in batch]).mean()
            gradients = torch.autograd.grad(value, parameters)
            for (parameter, mask), gradient in zip(masks.values(), gradients, strict=True):
                parameter.grad = gradient * mask  # a fused parameter holds projections that stay as they are
            stepper.step()
            losses.append(float(value.detach()))
            if after_step is not None:
                after_step(number)
        return losses


def ordinary(own: OwnParameters, one: Example) -> Tensor:
    """Mean next-token cross-entropy over the learned tokens."""
    ids, at = one
    log_probs = own.logits(ids).log_softmax(-1)
    return -torch.stack([log_probs[i - 1, ids[i]] for i in at]).mean()


def layer_causal(readout: str) -> Callable[[OwnParameters, Example], Tensor]:
    """Sum of early-exit losses, every block's input detached by a hook of torch's own."""

    def loss(own: OwnParameters, one: Example) -> Tensor:
        return torch.stack(early_exit_losses(own, one, readout)).sum()

    return loss


def early_exit_losses(own: OwnParameters, one: Example, readout: str) -> list[Tensor]:
    ids, at = one
    outputs: list[Tensor] = []
    handles = []

    def detach(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        name = "resid_pre" if own.kind == "hooked" else "hidden_states"
        return args, {**kwargs, name: kwargs[name].detach()}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for layer, block in enumerate(own.blocks()):
        handles.append(block.register_forward_pre_hook(detach, with_kwargs=True))
        handles.append((block if readout == "block" else own.attention(layer)).register_forward_hook(keep))
    try:
        own.logits(ids)
    finally:
        for handle in handles:
            handle.remove()
    losses = []
    for output in outputs:
        log_probs = own.unembed(output)[0].log_softmax(-1)
        losses.append(-torch.stack([log_probs[i - 1, ids[i]] for i in at]).mean())
    return losses


def _whole(tensor: Tensor) -> Tensor:
    return tensor
