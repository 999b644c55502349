"""What cannot be decomposed, and the message that says what was needed, what came and what to do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import bridge_of, make_bridge
from hosts import HOOKED_NAMES, build, build_hf, prompt, requires_hooked, shared

from metaopt_lens import ICLPrompt, MetaoptLensError, decompose, load_tiny, runs
from metaopt_lens._errors import (
    ContextWindowError,
    HeadError,
    NonFiniteError,
    OptionError,
    PromptError,
    SpanError,
    UnsupportedModelError,
)
from metaopt_lens.decomposition import _split_runs

MODEL = "bridge:gpt2"
HOSTS = [MODEL, *HOOKED_NAMES[:1]]


@pytest.mark.parametrize("name", HOSTS)
def test_no_demonstrations(name: str) -> None:
    with pytest.raises(PromptError, match=r"no demonstrations but at least one is needed.*Give demos="):
        decompose(shared(name), ICLPrompt([], "w10"))


def test_no_prompts_at_all() -> None:
    with pytest.raises(PromptError, match=r"no prompts: give at least one"):
        decompose(shared(MODEL), [])


def test_empty_query() -> None:
    with pytest.raises(PromptError, match=r"the query is empty"):
        decompose(shared(MODEL), ICLPrompt([("w10", "w11")], "  "))


@pytest.mark.parametrize("text", ["w10 :", "", "   \n "])
def test_a_string_without_a_demonstration(text: str) -> None:
    with pytest.raises(PromptError, match=r"the prompt (has no demonstration|is empty)"):
        decompose(shared(MODEL), text)


@pytest.mark.parametrize("name", HOSTS)
def test_too_long_a_prompt_says_both_numbers_and_how_many_demonstrations_fit(name: str) -> None:
    demos = [(f"w{10 + i}", f"w{11 + i}") for i in range(20)]  # 1 BOS + 20 x 4 + 2 = 83 tokens; 15 x 4 + 3 = 63 fit
    with pytest.raises(
        ContextWindowError,
        match=r"has 83 tokens but the context window holds 64: the first 15 of its 20 demonstrations would fit",
    ):
        decompose(shared(name), ICLPrompt(demos, "w70"))
    assert decompose(shared(name), ICLPrompt(demos[:15], "w70")).tokenized.n_tokens == 63


def test_a_query_too_long_on_its_own() -> None:
    long = " ".join(["w10"] * 70)
    with pytest.raises(ContextWindowError, match=r"even without demonstrations \(0 would fit\) it has 72"):
        decompose(shared(MODEL), ICLPrompt([("w10", "w11")], long))


@pytest.mark.parametrize("name", HOSTS)
def test_no_tokenizer(name: str) -> None:
    model = build(name)
    model.tokenizer = None
    with pytest.raises(PromptError, match=r"the tokenizer is missing.*AutoTokenizer\.from_pretrained"):
        decompose(model, prompt())


def test_an_unknown_word() -> None:
    with pytest.raises(PromptError, match=r"the tokenizer does not know 'zebrafish'"):
        decompose(load_tiny(), "apple : dax\nzebrafish :")


def test_a_tokenizer_of_another_model() -> None:
    model = make_bridge("gpt2", vocab_size=50)
    with pytest.raises(PromptError, match=r"token id 61, but .* knows only 50 tokens: it is not this model's tok"):
        decompose(model, "w60 : w61\nw10 :")


@pytest.mark.parametrize("position", [0, 5, 22, 26, -4, -27, 100])
def test_a_position_outside_the_query_names_the_query(position: int) -> None:
    with pytest.raises(SpanError, match=rf"position {position} is not in the query, which holds positions 23 to 25"):
        decompose(shared(MODEL), prompt(), position=position)


def unchecked(function: Any) -> Any:
    """The function as users call it: here in the tests a run-time type check stands before its own checks."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("position", ["first", 1.5, None])
def test_a_position_that_is_none(position: Any) -> None:
    with pytest.raises(OptionError, match=rf"must be 'last', 'all' or a token index, got {position!r}"):
        unchecked(runs.destinations_of)(decompose(shared(MODEL), prompt()).tokenized, position)


@pytest.mark.parametrize("option", ["matched", "", "Both", None])
def test_a_wrong_zero_shot_runs(option: Any) -> None:
    with pytest.raises(OptionError, match=rf"must be 'both', 'plain' or 'none', got {option!r}"):
        unchecked(decompose)(shared(MODEL), prompt(), zero_shot_runs=option)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one(batch_size: int) -> None:
    with pytest.raises(OptionError, match=rf"batch_size must be at least 1, got {batch_size}"):
        decompose(shared(MODEL), prompt(), batch_size=batch_size)


@pytest.mark.parametrize(("layer", "head"), [(3, 0), (0, 4), (-1, 0), (0, -1)])
def test_an_unknown_head_names_the_valid_ranges(layer: int, head: int) -> None:
    result = decompose(shared(MODEL), prompt())
    message = rf"there is no head L{layer}H{head}: the model has layers 0 to 2 with heads 0 to 3"
    for ask in (result.per_token, result.w_zsl, result.delta_w_icl, result.token_shares, result.residual_per_token):
        with pytest.raises(HeadError, match=message):
            ask(layer, head)


def test_a_position_that_was_not_decomposed() -> None:
    result = decompose(shared(MODEL), prompt())
    with pytest.raises(SpanError, match=r"position 24 was not decomposed; this result holds \[25\]"):
        result.delta_w_icl(0, 0, position=24)


def test_an_unknown_form() -> None:
    with pytest.raises(OptionError, match=r"form must be 'softmax' or 'linear', got 'exact'"):
        unchecked(_split_runs._weights)("exact")


def test_nan_weights_name_the_first_layer() -> None:
    hf_model = build_hf("gpt2")
    with torch.no_grad():
        for layer in (1, 2):
            hf_model.transformer.h[layer].attn.c_attn.weight[0, -1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"values of layer 1 hold NaN"):
        decompose(bridge_of(hf_model), prompt())


@requires_hooked
def test_nan_weights_of_a_hooked_transformer_name_the_first_layer() -> None:
    model = build("hooked:learned")
    with torch.no_grad():
        model.blocks[1].attn.W_V[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"values of layer 1 hold NaN"):
        decompose(model, prompt())


def test_overflow_on_this_prompt_only_names_the_layer_and_the_dtype() -> None:
    """The self-check's tokens do not meet the bad embedding; the prompt does."""
    hf_ids = {int(i) for i in (torch.arange(9) * 7919 + 5) % 96}
    assert 30 not in hf_ids
    model = build(MODEL)
    with torch.no_grad():
        model.original_model.transformer.wte.weight[30] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layer 0 hold NaN or infinity"):
        decompose(model, prompt())


@pytest.mark.parametrize("thing", ["gpt2", None, torch.nn.Linear(2, 2)])
def test_no_model(thing: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"(expected a TransformerLens model|is not supported)"):
        decompose(thing, prompt())


def test_all_errors_share_one_base() -> None:
    for error in (ContextWindowError, HeadError, NonFiniteError, OptionError, PromptError, SpanError):
        assert issubclass(error, MetaoptLensError)
