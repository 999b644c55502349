"""Block by block against transformers' own modules, their weights really changed: dense, for one token at a time.

Nothing of the library runs here but `compile_context` and ``patch.dense``. A block of a copied transformers model is
given the residual stream that enters it in context, on the tokens of the zero-shot prompt at their in-context
positions, with the changes of one token written into its weights; at this token it must give what it gives in context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosts import bridge_of, build_hf, prompt, requires_hooked
from torch import Tensor

from metaopt_lens import WeightPatch, compile_context

PROMPT = prompt(6)
Writes = Callable[[Any, WeightPatch, int, int], None]


def _add(weight: Tensor, patch: WeightPatch, layer: int, position: int, matrix: str) -> None:
    change = patch.dense(layer, position, matrix).AB
    weight.data += change if weight.shape == change.shape else change.mT


def llama(model: Any, patch: WeightPatch, layer: int, position: int) -> None:
    mlp = model.model.layers[layer].mlp
    for matrix, module in (("gate", mlp.gate_proj), ("in", mlp.up_proj), ("out", mlp.down_proj)):
        _add(module.weight, patch, layer, position, matrix)


def gpt2(model: Any, patch: WeightPatch, layer: int, position: int) -> None:
    mlp = model.transformer.h[layer].mlp  # its weights are kept the other way round
    mlp.c_fc.weight.data += patch.dense(layer, position, "in").AB.mT
    mlp.c_proj.weight.data += patch.dense(layer, position, "out").AB.mT


def opt(model: Any, patch: WeightPatch, layer: int, position: int) -> None:
    block = model.model.decoder.layers[layer]
    _add(block.fc1.weight, patch, layer, position, "in")
    _add(block.fc2.weight, patch, layer, position, "out")


def phi(model: Any, patch: WeightPatch, layer: int, position: int) -> None:
    _add(model.model.layers[layer].mlp.fc2.weight, patch, layer, position, "out")


def normed(model: Any, patch: WeightPatch, layer: int, position: int) -> None:
    block = model.model.layers[layer]
    _add(block.mlp.gate_proj.weight, patch, layer, position, "gate")
    _add(block.mlp.up_proj.weight, patch, layer, position, "in")
    assert patch.scale is not None
    block.post_feedforward_layernorm.weight.data += patch.scale[layer, position]


def mixture(model: Any, patch: WeightPatch, layer: int, position: int) -> None:
    mlp, own = model.model.layers[layer].mlp, patch.experts
    assert own is not None
    router = mlp._modules.get("gate") or mlp.router
    _add(router.weight, patch, layer, position, "router")
    right = patch.right["in"][layer, position]
    for expert, left in zip(own.active[layer, position], own.left_in[layer, position], strict=True):
        weight, change = mlp.experts.gate_up_proj.data[expert], torch.outer(left, right)
        weight += change if weight.shape == change.shape else change.mT
    weight, change = mlp.experts.down_proj.data[own.chosen[layer, position]], patch.dense(layer, position).AB
    weight += change if type(mlp.experts).__name__ == "MixtralExperts" else change.mT


CASES: list[tuple[str, Writes, dict[str, Any]]] = [
    ("llama", llama, {}),
    ("qwen2", llama, {}),
    ("gemma", llama, {}),
    ("gpt2", gpt2, {}),
    ("opt", opt, {}),
    ("phi", phi, {}),
    ("gemma3", normed, {"sliding_window": 64}),
    ("olmo2", normed, {}),
    ("mixtral", mixture, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gpt_oss", mixture, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}),
]


def _blocks(model: Any) -> Any:
    body = model._modules.get("model") or model.transformer
    body = body._modules.get("decoder") or body
    return body._modules.get("layers") or body.h


def _run(model: Any, ids: Any, positions: Tensor, layer: int, entering: Tensor | None) -> tuple[Tensor, Tensor]:
    """Residual stream before and after a block, ``[pos, d_model]``; what enters the block can be given."""
    seen: dict[str, Tensor] = {}

    def before(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stream = args[0] if args else options.pop("hidden_states")
        stream = stream if entering is None else entering[None]
        seen["before"] = stream[0]
        return (stream, *args[1:]), options

    def after(_: Any, args: Any, out: Any) -> None:
        seen["after"] = (out[0] if isinstance(out, tuple) else out)[0]

    block = _blocks(model)[layer]
    handles = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    with torch.no_grad():
        model(torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids)), position_ids=positions[None])
    for handle in handles:
        handle.remove()
    return seen["before"], seen["after"]


@pytest.mark.parametrize(("family", "write", "options"), CASES, ids=[case[0] for case in CASES])
def test_a_block_with_changed_weights_does_what_it_does_in_context(
    family: str, write: Writes, options: dict[str, Any]
) -> None:
    def fresh() -> Any:
        model = build_hf(family, dtype=torch.float64, **options)
        model.config._experts_implementation = "eager"
        return model

    patch = compile_context(bridge_of(fresh()), PROMPT)
    start, stop = patch.tokens.prefix.stop, patch.tokens.query.start
    kept = torch.tensor([*range(start), *patch.positions])
    for layer in range(3):
        entering, in_context = _run(fresh(), patch.tokens.ids, torch.arange(len(patch.tokens.ids)), layer, None)
        _, plain = _run(fresh(), patch.zero_shot_ids, kept, layer, entering[kept])
        for position in range(len(patch.query_ids)):
            model = fresh()
            with torch.no_grad():
                write(model, patch, layer, position)
            _, found = _run(model, patch.zero_shot_ids, kept, layer, entering[kept])
            wanted = in_context[stop + position]
            # Norms are in float32 inside, whatever the dtype; a scale patch multiplies their rounding by u / y.
            largest = 1.0 if patch.scale is None else float(patch.scale[layer, position].abs().max())
            torch.testing.assert_close(found[start + position], wanted, rtol=0, atol=1e-6 * max(largest, 10.0))
            assert (plain[start + position] - wanted).abs().max() > 1e-2


@requires_hooked
def test_the_output_projection_of_an_attention_only_model() -> None:
    from hosts import build

    patch = compile_context(build("hooked:attn_only", dtype=torch.float64), PROMPT)
    ids = torch.tensor([list(patch.zero_shot_ids)])
    start = patch.tokens.prefix.stop
    moved = torch.tensor([*range(start), *patch.positions])
    with torch.no_grad():
        _, in_context = build("hooked:attn_only", dtype=torch.float64).run_with_cache(torch.tensor([patch.tokens.ids]))
        for position in range(len(patch.query_ids)):
            model = build("hooked:attn_only", dtype=torch.float64)
            change = patch.dense(0, position, "o").AB  # d_model (head d_head) -> head d_head d_model
            model.blocks[0].attn.W_O.data += change.mT.reshape(4, 8, 32)
            places = model.pos_embed.W_pos[moved]
            out = model.run_with_hooks(
                ids,
                fwd_hooks=[("hook_pos_embed", lambda t, hook, at=places: at[None])],
                stop_at_layer=1,
            )
            wanted = in_context["blocks.0.hook_resid_post"][0, patch.positions[position]]
            torch.testing.assert_close(out[0, start + position], wanted, rtol=0, atol=1e-9)
