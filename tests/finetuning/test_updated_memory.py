"""dW_FT of the linear form, against models whose own weights are changed in one layer at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import bridge_of
from hosts import host_values, mask_query_to_demos, prompt, shared, tokenized
from own_parameters import OwnParameters
from torch import Tensor

from metaopt_lens import ICLPrompt
from metaopt_lens.finetuning import UpdatedMemory, WeightUpdate, delta_w_ft, finetune, updated_memory
from metaopt_lens.models import wrap
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs import Keep, record, tokenize_for

F64 = torch.float64
BRIDGES = ["gpt2", "llama", "qwen3", "gemma2", "bloom", "mistral", "stablelm"]
NAMES = [f"bridge:{family}" for family in BRIDGES]
try:
    from transformer_lens import HookedTransformer  # noqa: F401

    NAMES += ["hooked:rotary", "hooked:alibi", "hooked:qk_norm"]
except ImportError:  # TransformerLens 4
    pass
PROMPT = prompt(3)


@cache
def update_of(name: str) -> WeightUpdate:
    return finetune(shared(name, F64), PROMPT, lr=1.0, projections=("k", "v"), progress=False)


@cache
def memory_of(name: str, text: ICLPrompt = PROMPT) -> tuple[TokenizedPrompt, UpdatedMemory]:
    model = wrap(shared(name, F64))
    tokens = tokenized(model, text)
    others = [replace(text, query=query) for query in ("w50", "w51 w52 w53 w54")]  # in the batch, of other lengths
    runs = record(
        model,
        [tokens, *(tokenized(model, other) for other in others)],
        settings=("zs_matched",),
        keep=Keep(own_stream=True),
    )
    return tokens, updated_memory(model, update_of(name), [r.zs_matched for r in runs])[0]


def host_memory(model: Any, tokens: TokenizedPrompt) -> tuple[list[Tensor], list[Tensor]]:
    """Keys (rotated) and values of all tokens in a full run in which no token of Q sees D, by the host's own hooks."""
    edits = mask_query_to_demos(model, tokens)
    rotated = "blocks.0.attn.hook_rot_k" in model.hook_dict and model.cfg.positional_embedding_type == "rotary"
    keys = host_values(model, tokens.ids, "attn.hook_rot_k" if rotated else "attn.hook_k", edits=edits)
    values = host_values(model, tokens.ids, "attn.hook_v", edits=edits)
    return [k.reshape(len(k), -1) for k in keys], [v.reshape(len(v), -1) for v in values]


def z_rows(tokens: TokenizedPrompt) -> list[int]:
    return [i for i in range(tokens.n_tokens) if i not in tokens.demonstrations]


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_are_those_of_a_model_changed_in_that_layer_alone(name: str) -> None:
    tokens, memory = memory_of(name)
    update, rows = update_of(name), z_rows(tokens)
    tolerance = 1e-10 if name in {"bridge:gpt2", "hooked:alibi"} else 2e-6  # where the host rotates in float32
    keys, values = host_memory(shared(name, F64), tokens)
    for layer in range(3):
        own = OwnParameters(name).copy()
        for field, change in update.tensors().items():
            own.add_(layer, field[-1], field[0], change[layer])
        changed = own.model if name.startswith("hooked") else bridge_of(own.model)
        new_keys, new_values = host_memory(changed, tokens)
        for found, expected in (
            (memory.k, keys[layer]),
            (memory.v, values[layer]),
            (memory.k_updated, new_keys[layer]),
            (memory.v_updated, new_values[layer]),
        ):
            torch.testing.assert_close(found[layer].flatten(1), expected[rows], rtol=0, atol=tolerance)
        assert (memory.v_updated[layer] - memory.v[layer]).abs().max() > 1e-3
        assert (memory.k_updated[layer] - memory.k[layer]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["bridge:gpt_neox", "bridge:gpt_oss"])
def test_without_an_update_nothing_changes(name: str) -> None:
    dtype = torch.float32
    model = wrap(shared(name, dtype))
    tokens = tokenized(model, PROMPT)
    update = 0.0 * finetune(model, PROMPT, lr=1.0, progress=False)
    (runs,) = record(model, [tokens], settings=("zs_matched",), keep=Keep(own_stream=True))
    memory = updated_memory(model, update, [runs.zs_matched])[0]
    assert torch.equal(memory.k, memory.k_updated)
    assert torch.equal(memory.v, memory.v_updated)
    assert memory.k.shape[1] == len(z_rows(tokens))


@pytest.mark.parametrize("instruction", [None, "w20 w21"])
@pytest.mark.parametrize("query", ["w16 :", "w16 w17 w18 :"])
def test_rank_is_at_most_twice_the_tokens_of_z(instruction: str | None, query: str) -> None:
    tokens, memory = memory_of("bridge:gpt2", prompt(3, query=query, instruction=instruction))
    n_z = len(z_rows(tokens))
    d_head = memory.k.shape[-1]
    for layer in range(3):
        for head in range(4):
            after = memory.v_updated[layer, :, head].T @ memory.k_updated[layer, :, head]
            before = memory.v[layer, :, head].T @ memory.k[layer, :, head]
            rank = int(torch.linalg.matrix_rank(after - before, rtol=1e-10))
            assert 1 <= rank <= min(d_head, 2 * n_z)


def test_the_bound_is_reached_by_a_query_of_two_tokens_without_anything_before_it() -> None:
    model = wrap(shared("bridge:gpt2", F64))
    tokens = [tokenize_for(model, prompt(1, query="w16 :", instruction=None), prepend_bos=False)]
    assert (len(tokens[0].prefix), len(tokens[0].query)) == (0, 2)
    (runs,) = record(model, tokens, settings=("zs_matched",), keep=Keep(own_stream=True))
    memory = updated_memory(model, update_of("bridge:gpt2"), [runs.zs_matched])[0]
    after = memory.v_updated[1, :, 0].T @ memory.k_updated[1, :, 0]
    before = memory.v[1, :, 0].T @ memory.k[1, :, 0]
    assert int(torch.linalg.matrix_rank(after - before, rtol=1e-10)) == 4 < memory.k.shape[-1]


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "bridge:mistral"])
def test_delta_w_ft_is_the_difference_of_the_two_memories(name: str) -> None:
    """Over the sources the destination sees, head by head, as outer products one by one."""
    tokens, memory = memory_of(name)
    n_z = len(z_rows(tokens))
    seen = torch.arange(n_z) % 3 != 1
    for layer in range(3):
        matrices = delta_w_ft(memory, layer, seen).AB
        for head in range(memory.k.shape[2]):
            expected = sum(
                torch.outer(memory.v_updated[layer, i, head], memory.k_updated[layer, i, head])
                - torch.outer(memory.v[layer, i, head], memory.k[layer, i, head])
                for i in range(n_z)
                if seen[i]
            )
            torch.testing.assert_close(matrices[head], expected, rtol=0, atol=1e-9)
            assert matrices[head].abs().max() > 1e-3
