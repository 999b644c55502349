"""wrap(): what is accepted, what is refused and why, what is remembered, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from families import bridge_of, make_hf, make_hooked, make_native_model
from hosts import HOOKED_NAMES, HOST_NAMES, build, left_as_it_was, requires_hooked, shared
from torch import Tensor, nn

from metaopt_lens import MetaoptLensError, decompose, wrap
from metaopt_lens._errors import NonFiniteError, UnsupportedModelError
from metaopt_lens.models import LensModel, ModelInfo

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def tiny_t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def tiny_mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


def tiny_bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def tiny_deepseek() -> Any:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    config = transformers.DeepseekV3Config(
        **SMALL, **latent, **experts, n_group=1, topk_group=1, first_k_dense_replace=1
    )
    return transformers.DeepseekV3ForCausalLM(config)


def tiny_llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=48, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        num_experts_per_tok=1, attention_chunk_size=6, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


def dynamic_ntk() -> Any:
    return make_hf("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def falcon_with_alibi() -> Any:
    return make_hf("falcon", alibi=True)


def clipped_mpt() -> Any:
    return make_hf("mpt", attn_config={"clip_qkv": 6.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_t5, r"T5ForConditionalGeneration\) is an encoder-decoder; only decoder-only models"),
        (tiny_mamba, r"MambaForCausalLM\): layer 0 has no attention \(state-space"),
        (tiny_bert, r"BertForMaskedLM\) is an encoder; only decoder-only models"),
        (tiny_deepseek, r"DeepseekV3ForCausalLM\) uses multi-head latent attention \(MLA\)"),
        (tiny_llama4, r"Llama4ForCausalLM\) is not supported: some of its layers attend in chunks"),
        (dynamic_ntk, r"LlamaForCausalLM\) has a rotary embedding that depends on the sequence length \(dynamic\)"),
        (falcon_with_alibi, r"FalconForCausalLM\) is not supported: .* adds Falcon's ALiBi bias twice"),
        (clipped_mpt, r"MptForCausalLM\): layer 0 clips queries, keys and values \(clip_qkv\)"),
    ],
)
def test_architectures_that_cannot_be_split_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(bridge_of(make()))


def test_eager_falcon_with_alibi_is_another_model_than_the_trained_one() -> None:
    """Why it is refused: attention with the fused kernel, as Falcon was trained, adds the bias once."""
    eager = falcon_with_alibi()
    fused = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(eager.config), attn_implementation="sdpa"
    ).eval()
    fused.load_state_dict(eager.state_dict())
    tokens = torch.arange(6, 30)[None]
    with torch.no_grad():
        assert (eager(tokens).logits - fused(tokens).logits).abs().max() > 0.01


@requires_hooked
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("learned", {"positional_embedding_type": "shortformer"}, r"positional embedding 'shortformer'"),
        ("learned", {"attention_dir": "bidirectional"}, r"bidirectional attention"),
        ("rotary", {"use_dynamic_ntk_rope": True}, r"length-dependent rotary embedding \(dynamic NTK\)"),
        ("learned", {"use_attn_in": True}, r"use_attn_in \(switch it off"),
        ("learned", {"use_split_qkv_input": True}, r"use_split_qkv_input \(switch it off"),
    ],
)
def test_hooked_transformers_that_cannot_be_split_are_refused_by_reason(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(make_hooked(kind, **options))


def test_a_native_bridge_that_looks_ahead_is_refused() -> None:
    model = bridge_of(make_native_model("learned", attention_dir="bidirectional"))
    with pytest.raises(UnsupportedModelError, match=r"layer 0 attends in both directions"):
        wrap(model)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda: make_hf("gpt2"), r"class GPT2LMHeadModel is not supported: wrap it first: TransformerBridge\.boot"),
        (lambda: nn.Linear(2, 2), r"class Linear is not supported: only HookedTransformer \(3\.x\) and Transformer"),
        (lambda: "gpt2", r"expected a TransformerLens model, got str: load one first.*boot_transformers\('gpt2'\)"),
        (lambda: None, r"expected a TransformerLens model, got NoneType"),
    ],
)
def test_things_that_are_no_transformer_lens_model(thing: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        wrap(thing())
    assert isinstance(caught.value, MetaoptLensError)
    assert isinstance(caught.value, TypeError)


# ---- weights that make no sense -------------------------------------------------------------------------------------


def value_weight(model: Any, layer: int) -> Tensor:
    """The parameter itself, on a Llama bridge."""
    return model.original_model.model.layers[layer].self_attn.v_proj.weight


def test_nan_weights_name_the_first_layer() -> None:
    hf_model = make_hf("llama")
    with torch.no_grad():
        for layer in (1, 2):
            hf_model.model.layers[layer].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"values of layer 1 hold NaN or infinity") as caught:
        wrap(bridge_of(hf_model))
    assert "layer 2" not in str(caught.value)


@requires_hooked
def test_nan_weights_of_a_hooked_transformer() -> None:
    model = make_hooked()
    with torch.no_grad():
        model.blocks[2].attn.W_K[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"keys of layer 2 hold NaN"):
        wrap(model)


def test_weights_edited_after_wrapping_are_checked_again() -> None:
    hf_model = make_hf("llama")
    model = bridge_of(hf_model)
    wrapped = wrap(model)
    assert wrap(model) is wrapped
    weight = dict(hf_model.named_parameters())
    name = next(n for n in weight if "layers.1" in n and "v_proj" in n and n.endswith("weight"))
    with torch.no_grad():
        weight[name][0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layer 1"):
        wrap(model)


# ---- remembering without holding on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:gpt2", *HOOKED_NAMES[:1]])
def test_a_wrapped_model_is_freed_when_nobody_holds_it(name: str) -> None:
    model = build(name)
    decompose(model, "w10 : w11\nw12 :")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_the_check_is_not_repeated_for_a_model_that_passed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bridge:gpt2")
    passes: list[int] = []

    def count(tensor: Tensor, hook: Any) -> None:
        passes.append(1)

    model.embed.hook_out.add_hook(count)
    wrap(model)
    gc.collect()  # the first wrapper is gone
    assert len(passes) == 1
    assert isinstance(wrap(model), LensModel)
    assert len(passes) == 1


def test_wrapping_twice_gives_the_wrapped_model_back() -> None:
    wrapped = wrap(shared("bridge:gpt2"))
    assert wrap(wrapped) is wrapped
    assert wrap(shared("bridge:gpt2")) is wrapped


# ---- a host whose attention does something else ---------------------------------------------------------------------


@pytest.fixture
def own_hook() -> Iterator[Any]:
    model = build("bridge:gpt2")
    yield model
    model.reset_hooks()


@pytest.mark.parametrize(
    ("point", "edit", "message"),
    [
        ("blocks.1.attn.hook_attn_scores", lambda t: t * 1.5, r"attention pattern from q and k of layer 1 misses"),
        ("blocks.2.attn.hook_z", lambda t: t + 0.5, r"head outputs from pattern and v of layer 2 misses"),
    ],
)
def test_self_check_finds_attention_that_its_hooks_do_not_show(
    own_hook: Any, point: str, edit: Callable[[Tensor], Tensor], message: str
) -> None:
    def user_hook(tensor: Tensor, hook: Any) -> Tensor:
        return edit(tensor)

    own_hook.hook_dict[point].add_hook(user_hook)
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(own_hook)


@pytest.mark.parametrize("window", [6, 20])
def test_self_check_looks_beyond_sliding_windows(window: int) -> None:
    """An attention that goes wrong only past the window, where nine tokens do not reach."""
    model = build("bridge:mistral", sliding_window=window)

    def wrong_far_away(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[:, :, window + 8 :, window + 8] += 1.0
        return scores

    model.hook_dict["blocks.1.attn.hook_attn_scores"].add_hook(wrong_far_away)
    with pytest.raises(UnsupportedModelError, match=r"attention pattern from q and k of layer 1 misses"):
        wrap(model)
    model.reset_hooks()


@pytest.mark.parametrize(("name", "n_tokens"), [("bridge:gpt2", 9), ("bridge:mistral", 15), ("bridge:gemma2", 15)])
def test_self_check_is_long_only_where_there_are_windows(name: str, n_tokens: int) -> None:
    model = build(name)
    seen: list[int] = []
    model.hook_dict["embed.hook_out"].add_hook(lambda tensor, hook: seen.append(tensor.shape[1]))
    wrap(model)
    assert seen == [n_tokens]


def test_hooks_that_do_not_fire_are_named() -> None:
    """An architecture nobody has looked at: the wrapper says what it misses instead of raising a KeyError."""
    model = build("bridge:llama")
    wrapped = wrap(model)
    hooks = [hook for hook in wrapped.attention_hooks(1, lambda call: None) if not hook[0].endswith("hook_rot_k")]
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM\): the hook on k of layer 1 does not fire"):
        wrapped.run(torch.tensor([[1, 2]]), hooks=hooks)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_wrapping_leaves_the_model_as_it_was(name: str) -> None:
    model = build(name)
    model.train()
    with left_as_it_was(model):
        wrap(model)
    assert model.training


def test_a_failed_check_leaves_the_model_as_it_was() -> None:
    model = bridge_of(falcon_with_alibi())
    model.train()
    with left_as_it_was(model), pytest.raises(UnsupportedModelError):
        wrap(model)


# ---- what the wrapper says ------------------------------------------------------------------------------------------


def test_info_and_repr() -> None:
    wrapped = wrap(shared("bridge:llama"))
    info = wrapped.info
    assert isinstance(info, ModelInfo)
    assert (info.n_layers, info.n_heads, info.n_kv_heads, info.d_model, info.d_head) == (3, 4, 2, 32, 8)
    assert (info.host, info.architecture) == ("TransformerBridge", "LlamaForCausalLM")
    assert (info.n_ctx, info.d_vocab, info.dtype, info.positions) == (64, 96, "float32", "rotary")
    assert info.processing == ()
    assert not info.is_processed
    text = repr(wrapped)
    assert "TransformerBridge, LlamaForCausalLM, 3 layers x 4 heads, 2 key-value heads, d_head 8" in text
    assert "raw weights" in text


def test_unknown_hook_names_are_refused_before_anything_runs() -> None:
    wrapped = wrap(shared("bridge:gpt2"))
    with pytest.raises(
        UnsupportedModelError, match=r"no hook point 'blocks\.0\.attn\.hook_zz' \(it has blocks\.0\.attn\.hook_z"
    ):
        wrapped.run(torch.tensor([[1, 2]]), hooks=[("blocks.0.attn.hook_zz", lambda _: None)])
