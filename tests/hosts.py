"""Shared small models, and what their hosts themselves say about a prompt: oracles that use none of our code.

The models returned here are shared by many tests: never modify them, build your own with `families` instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    HOOKED,
    NATIVE,
    bridge_of,
    has_hooked_transformer,
    make_hf,
    make_hooked,
    make_native_model,
)
from torch import Tensor

from metaopt_lens import Demo, ICLPrompt, Template, wrap
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs import tokenize_for

NATIVE_NAMES = [f"native:{kind}" for kind in NATIVE]
HOST_NAMES = [
    *(f"bridge:{family}" for family in FAMILIES),
    *NATIVE_NAMES,
    *(f"hooked:{kind}" for kind in HOOKED if has_hooked_transformer()),
]
HOOKED_NAMES = [name for name in HOST_NAMES if name.startswith("hooked:")]

# The attention inside is the host's own: edits of scores and pattern are discarded.
NATIVE_ATTENTION = {"bridge:opt", "bridge:gptj", "bridge:gpt_neo", *NATIVE_NAMES}
# Softmax in float32 whatever the dtype, of scores that are rebuilt, or (MPT) shifted by a constant in a longer run.
FLOAT32_SOFTMAX = {"bridge:opt", "bridge:gptj", "bridge:gpt_neo", "bridge:mpt"}
# The bridge ignores a cache under TransformerLens 3.x.
FORGETFUL = {"bridge:mpt"} if has_hooked_transformer() else set()
# The attention output is normalised inside or right after the attention module.
POST_NORMED = {"hooked:window_softcap"}

_NOT_SHARPENED = re.compile("embed|wte|lm_head|mlp|fc|experts")
_SHARPEN = {"gemma3": 1.0, "gemma2": 1.5, "gpt2": 4.0, "gptj": 3.0}

requires_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="HookedTransformer ended with TransformerLens 3.x"
)


def build(name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A new model, free to be modified."""
    kind, family = name.split(":")
    if kind == "hooked":
        return make_hooked(family, dtype=dtype, **overrides)
    return bridge_of(build_apart(name, dtype=dtype, **overrides))


def build_apart(name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """The model that is inside the bridge, or the HookedTransformer itself."""
    kind, family = name.split(":")
    if kind == "hooked":
        return make_hooked(family, dtype=dtype, **overrides)
    if kind == "native":
        return _sharpened(make_native_model(family, dtype=dtype, **overrides), family)
    return build_hf(family, dtype=dtype, **overrides)


def build_hf(family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A transformers model whose attention is not nearly uniform, as it is with small random weights."""
    return _sharpened(make_hf(family, dtype=dtype, **overrides), family)


def _sharpened(model: Any, family: str) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not _NOT_SHARPENED.search(name):
                parameter.mul_(_SHARPEN.get(family, 2.5))
    return model


@cache
def shared(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model for reading only."""
    return build(name, dtype=dtype)


def prompt(
    n_demos: int = 4, *, query: str = "w16 w17 :", instruction: str | None = "w20 w21", first: int = 30
) -> ICLPrompt:
    """Demonstrations of unequal length; ids equal the numbers in the words."""
    demos = []
    for i in range(n_demos):
        at = first + 4 * i
        text = f"w{at}" if i % 2 else f"w{at} w{at + 1}"
        label = f"w{at + 2} w{at + 3}" if i == 1 else f"w{at + 2}"
        demos.append(Demo(text, label))
    return ICLPrompt(demos, query.removesuffix(" :"), Template(), instruction)


def tokenized(model: Any, text: ICLPrompt) -> TokenizedPrompt:
    return tokenize_for(wrap(model), text)


def sizes(model: Any) -> tuple[int, int]:
    return int(model.cfg.n_layers), int(model.cfg.n_heads)


def device_of(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def host_values(
    model: Any, ids: Sequence[int], hook: str, *, edits: Sequence[tuple[str, Callable[..., Any]]] = ()
) -> list[Tensor]:
    """What the host's own hook shows in every layer (without batch axis), with edits made by the host's own hooks."""
    seen: dict[int, Tensor] = {}
    n_layers, _ = sizes(model)

    def keep(layer: int) -> Callable[..., None]:
        def store(tensor: Tensor, hook: Any) -> None:
            seen[layer] = tensor.detach()[0].clone()

        return store

    reads = [(f"blocks.{layer}.{hook}", keep(layer)) for layer in range(n_layers)]
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([list(ids)], device=device_of(model)), fwd_hooks=[*edits, *reads])
    return [seen[layer] for layer in range(n_layers)]


def host_z(model: Any, ids: Sequence[int], **options: Any) -> Tensor:
    """[pos, layer, head, d_head], from the host's own hooks."""
    n_heads = sizes(model)[1]
    values = host_values(model, ids, "attn.hook_z", **options)
    return torch.stack([z.reshape(z.shape[0], n_heads, -1) for z in values], dim=1)


def mask_query_to_demos(model: Any, tokens: TokenizedPrompt) -> list[tuple[str, Callable[..., Any]]]:
    """Edits of the host's own scores: no token of Q sees D, in every layer and head."""
    return hide_demos(tokens, range(len(tokens.demos)), range(sizes(model)[0]))


def hide_demos(
    tokens: TokenizedPrompt, demos: Sequence[int], layers: Sequence[int]
) -> list[tuple[str, Callable[..., Any]]]:
    """Edits of the host's own scores: no token of Q sees these demonstrations, in all heads of these layers."""

    def hide(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        for demo in demos:
            scores[..., tokens.query.slice, tokens.demos[demo].slice] = -torch.inf
        return scores

    return [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in layers]


_OUT_PROJECTIONS = ("o", "o_proj", "out_proj", "c_proj", "dense")


def transformers_z(name: str, tokens: TokenizedPrompt, *, hide_demos: bool) -> Tensor:
    """z of every layer, ``[pos, layer, d_model]``, from the model without any bridge, its mask made by hand."""
    model = build_apart(name)
    n = tokens.n_tokens
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    if hide_demos:
        allowed[tokens.query.slice, tokens.demonstrations.slice] = False
    mask = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()[0].clone()))
        for path, module in model.named_modules()
        if path.split(".")[-1] in _OUT_PROJECTIONS and ("attn" in path or "attention" in path)
    ]
    assert len(handles) == 3
    with torch.no_grad():
        model(torch.tensor([tokens.ids]), attention_mask=mask[None, None], position_ids=torch.arange(n)[None])
    return torch.stack(seen, dim=1)


@contextmanager
def left_as_it_was(model: Any):  # type: ignore[no-untyped-def]
    """Require that a block leaves no trace: hooks, modes, requires_grad, weights, next logits, global grad state."""
    tokens = torch.tensor([[1, 30, 31, 3, 40]])
    logits = _logits(model, tokens)  # first: a bridge attaches hooks of its own in its first pass
    before = _state(model)
    grad = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() is grad
    after = _state(model)
    for key, value in before.items():
        assert after[key] == value, f"{key} changed"
    assert torch.equal(_logits(model, tokens), logits)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # dropout, where a model is in training mode
        return model(tokens).clone()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _state(model: Any) -> dict[str, Any]:
    # A bridge keeps the transformers model beside its own modules: both are looked at.
    roots = [model] if getattr(model, "original_model", None) is None else [model, model.original_model]
    modules = {id(module): module for root in roots for module in root.modules()}.values()
    parameters = {id(p): p for root in roots for p in root.parameters()}.values()
    buffers = {id(b): b for root in roots for b in root.buffers()}.values()
    return {
        "forward hooks": [list(m._forward_hooks) for m in modules],
        "forward pre-hooks": [list(m._forward_pre_hooks) for m in modules],
        "backward hooks": [list(m._backward_hooks) for m in modules],
        "lens handles": [
            [id(h) for h in point.fwd_hooks] + [id(h) for h in point.bwd_hooks] for point in model.hook_dict.values()
        ],
        "training modes": [m.training for m in modules],
        "requires_grad": [p.requires_grad for p in parameters],
        "gradients": [p.grad is None for p in parameters],
        "weights": [(p.data_ptr(), p.dtype, _bytes(p)) for p in parameters],
        "buffers": [(b.shape, _bytes(b)) for b in buffers],
    }
