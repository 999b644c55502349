"""What cannot be patched, or not with this patch, is said before anything expensive is run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hosts import build, prompt, requires_hooked, shared
from torch import Tensor

from metaopt_lens import ICLPrompt, MetaoptLensError, WeightPatch, compile_context, intervene
from metaopt_lens._errors import (
    HeadError,
    ModelMismatchError,
    OptionError,
    PromptError,
    SpanError,
    UndefinedMetricError,
    UnsupportedModelError,
)
from metaopt_lens.patches import generate_without_prompt

PROMPT = prompt()


@cache
def compiled(name: str = "bridge:llama") -> WeightPatch:
    return compile_context(shared(name), PROMPT)


def run(model: Any, patch: WeightPatch, ids: Any) -> Tensor:
    with intervene(model, patch), torch.no_grad():
        return model(torch.tensor([list(ids)]))


def test_a_patch_of_another_model_weights_or_dtype() -> None:
    patch = compiled()
    with pytest.raises(ModelMismatchError, match=r"this patch was made with .* \(n_kv_heads = 2\)"):
        run(shared("bridge:llama_mqa"), patch, patch.zero_shot_ids)
    with pytest.raises(
        ModelMismatchError, match=r"architecture = LlamaForCausalLM.*Make it again with compile_context"
    ):
        run(shared("bridge:qwen2"), patch, patch.zero_shot_ids)
    with pytest.raises(ModelMismatchError, match=r"dtype = float32.*has dtype = float64"):
        run(shared("bridge:llama", torch.float64), patch, patch.zero_shot_ids)
    other = build("bridge:llama", seed=1)
    with pytest.raises(ModelMismatchError, match=r"other weights than those of .* differs"):
        run(other, patch, patch.zero_shot_ids)


def test_a_patch_of_another_prompt_or_position() -> None:
    model, patch = shared("bridge:llama"), compiled()
    ids = list(patch.zero_shot_ids)
    with pytest.raises(SpanError, match=r"compiled for another prompt.*at position 4 .* for token id 16, .* has 40"):
        run(model, patch, [*ids[:4], 40, *ids[5:]])
    with pytest.raises(SpanError, match="must begin with S"):
        run(model, patch, [ids[0], 40, *ids[2:]])
    with pytest.raises(SpanError, match=r"changes for 3 tokens behind S \(positions 4 to 6 .* one at position 7"):
        run(model, patch, [*ids, 40])


def test_a_prompt_without_context() -> None:
    with pytest.raises(PromptError, match="demonstration"):
        compile_context(shared("bridge:llama"), ICLPrompt([], "w16"))


def test_options() -> None:
    model = shared("bridge:llama")
    with pytest.raises(OptionError, match="precision must be one of 'model', 'float32', 'float64' or None, got 'half'"):
        compile_context(model, PROMPT, precision="half")
    with pytest.raises(OptionError, match="n_tokens must be 1 or more, got 0"):
        generate_without_prompt(model, PROMPT, 0)
    with pytest.raises(MetaoptLensError, match="context window"):
        generate_without_prompt(model, PROMPT, 200)


def test_a_matrix_layer_or_token_that_is_not_there() -> None:
    patch = compiled()
    with pytest.raises(OptionError, match="changes the matrices 'gate', 'in', 'out', there is no 'o'"):
        patch.dense(0, 0, "o")
    with pytest.raises(HeadError, match="there is no layer 3"):
        patch.dense(3)
    with pytest.raises(OptionError, match="there is no token 3: the patch has changes for 3 tokens"):
        patch.dense(0, 3)


@requires_hooked
def test_an_mlp_is_asked_for_and_there_is_none() -> None:
    with pytest.raises(OptionError, match="changes the matrices 'o', there is no 'in'"):
        compiled("hooked:attn_only").dense(0, 0, "in")


def test_an_output_matrix_applied_to_nothing() -> None:
    model = build("bridge:opt")
    block = model.original_model.model.decoder.layers[1]
    with torch.no_grad():
        block.fc1.bias.fill_(-1e4)  # every ReLU is off
    with pytest.raises(
        UndefinedMetricError, match="in layer 1 at position 23: what the output matrix is applied to is 0"
    ):
        compile_context(model, PROMPT)


def test_an_input_of_nothing() -> None:
    model = build("bridge:llama")
    with torch.no_grad():
        model.original_model.model.layers[2].post_attention_layernorm.weight.zero_()
    with pytest.raises(UndefinedMetricError, match="in layer 2 at position 23: the MLP's input is 0 there"):
        compile_context(model, PROMPT)


def test_a_normalised_output_with_a_coordinate_of_0() -> None:
    model = build("bridge:olmo2")
    with torch.no_grad():
        model.original_model.model.layers[1].mlp.down_proj.weight[5].zero_()
    with pytest.raises(UndefinedMetricError, match=r"in layer 1 at position 23: .* has a coordinate that is 0"):
        compile_context(model, PROMPT)


@requires_hooked
def test_experts_that_are_not_shown() -> None:
    model = build("hooked:learned", num_experts=2, experts_per_token=1, gated_mlp=True)
    with pytest.raises(UnsupportedModelError, match="mixture of experts, which a HookedTransformer does not show"):
        compile_context(model, PROMPT)
