"""What the wrapper reads off every family, against the host's own hooks, caches and plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosts import (
    HOST_NAMES,
    NATIVE_ATTENTION,
    build_hf,
    host_values,
    host_z,
    prompt,
    requires_hooked,
    shared,
)
from rounding import PASS, STEP, SUM, assert_agree, of_pass
from torch import Tensor

from metaopt_lens import wrap
from metaopt_lens.models import AttentionCall

TOKENS = torch.tensor([[1, 30, 31, 3, 32, 4, 34, 3, 36, 37, 4, 16, 17, 3]])
# A row of a pattern from q and k: two steps, and on each side scores of 10, whose rounding is 5 units in a probability.
PATTERN = 6 * STEP
BATCH = torch.cat([TOKENS, TOKENS.flip(1), (TOKENS * 7 + 3) % 96])


def calls(model: Any, tokens: Tensor, **options: Any) -> dict[int, AttentionCall]:
    wrapped = wrap(model)
    seen: dict[int, AttentionCall] = {}

    def keep(call: AttentionCall) -> None:
        seen[call.layer] = call

    hooks = [
        hook
        for layer in range(wrapped.info.n_layers)
        for hook in wrapped.attention_hooks(layer, keep, prefix=options.get("prefix"))
    ]
    wrapped.run(tokens, hooks=hooks, **options)
    return seen


@pytest.mark.parametrize("name", [n for n in HOST_NAMES if n.startswith("bridge:")])
def test_keys_and_values_are_those_of_transformers_own_cache(name: str) -> None:
    hf_model = build_hf(name.split(":")[1])
    cache = transformers_cache()
    with torch.no_grad():
        hf_model(BATCH, past_key_values=cache, use_cache=True)
    for layer, call in calls(shared(name), BATCH).items():
        stored = cache.layers[layer]
        keys, values = stored.keys.transpose(1, 2), stored.values.transpose(1, 2)
        assert_agree(call.k, keys, of_pass(name))
        assert_agree(call.v, values, of_pass(name))


def transformers_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()  # without a config: with one, sliding layers drop keys


def loop_pattern(call: AttentionCall, batch: int, head: int, dst: int) -> Tensor:
    """Probabilities of one row from q and k, written out: scale, soft-cap, ALiBi, window, sink."""
    rule = call.rule
    kv = head // (call.q.shape[2] // call.k.shape[2])
    at = call.offset + dst
    row = []
    for src in range(call.k.shape[1]):
        score = float(call.q[batch, dst, head].double() @ call.k[batch, src, kv].double()) * rule.scale
        if rule.softcap is not None:
            score = rule.softcap * math.tanh(score / rule.softcap)
        if rule.alibi_slopes is not None:
            score -= float(rule.alibi_slopes[head]) * (at - src)
        if src > at or (rule.window is not None and at - src >= rule.window):
            score = -math.inf
        row.append(score)
    extra = 0.0 if rule.sinks is None else math.exp(float(rule.sinks[head].detach()))
    weights = torch.tensor(row, dtype=torch.float64).exp()
    return weights / (weights.sum() + extra)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_pattern_from_queries_and_keys_is_the_hosts_own(name: str) -> None:
    """A loop over q and k as handed out gives the pattern the host's own hook shows."""
    model = shared(name)
    own = host_values(model, TOKENS[0].tolist(), "attn.hook_pattern")
    for layer, call in calls(model, TOKENS).items():
        for head, dst in [(0, 13), (3, 13), (1, 7), (2, 0)]:
            expected = own[layer][head, dst]
            assert_agree(loop_pattern(call, 0, head, dst).float(), expected, PATTERN)
            assert_agree(call.pattern[0, head, dst], expected, PATTERN)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_behind_a_shared_prefix_everything_is_as_in_the_full_prompt(name: str) -> None:
    model = shared(name)
    wrapped = wrap(model)
    full = calls(model, BATCH[:1].expand(2, -1))
    n = 9
    prefix = wrapped.run_prefix(TOKENS[0, :n])
    assert prefix.n_tokens == n
    own = host_z(model, TOKENS[0].tolist())[n:]
    behind = calls(model, TOKENS[:, n:].expand(2, -1), prefix=prefix)
    for layer, call in behind.items():
        whole = full[layer]
        assert call.offset == n
        assert call.dst_positions.tolist() == list(range(n, TOKENS.shape[1]))
        assert_agree(call.q, whole.q[:, n:], of_pass(name))
        assert_agree(call.k, whole.k, of_pass(name))
        assert_agree(call.v, whole.v, of_pass(name))
        assert_agree(call.pattern, whole.pattern[:, :, n:], of_pass(name))
        assert_agree(call.z[0], own[:, layer], of_pass(name))
        assert_agree(call.scores(), whole.scores()[:, :, n:], of_pass(name))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_logits_behind_a_prefix_are_the_hosts_own(name: str) -> None:
    model = shared(name)
    wrapped = wrap(model)
    with torch.no_grad():
        own = model(TOKENS)[0]
    prefix = wrapped.run_prefix(TOKENS[0, :9])
    logits = wrapped.run(TOKENS[:, 9:], prefix=prefix)
    assert logits is not None
    assert_agree(logits[0], own[9:], of_pass(name))
    again = wrapped.run(TOKENS[:, 9:], prefix=prefix)  # the prefix is not used up
    assert again is not None
    assert torch.equal(again, logits)
    plain = wrapped.run(TOKENS)
    assert plain is not None
    assert_agree(plain[0], own, of_pass(name))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_what_attention_hooks_return_replaces_z(name: str) -> None:
    """Also where the host discards edits of scores and pattern."""
    model = shared(name)
    wrapped = wrap(model)

    def knock_out(z: Tensor) -> Tensor:
        kept = z.clone()
        kept[:, :, 2] = 0.0  # not all of z by a factor: a norm behind W_O would undo it
        return kept

    edited = wrapped.run(TOKENS, hooks=wrapped.attention_hooks(1, lambda call: knock_out(call.z)))

    def own(z: Tensor, hook: Any) -> Tensor:
        return knock_out(z)

    with torch.no_grad():
        expected = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", own)])
        untouched = model(TOKENS)
    assert edited is not None
    # Not to the bit: an ALiBi table from a longer run shifts all scores by a constant.
    assert_agree(edited, expected, of_pass(name))
    assert (edited - untouched).abs().max() > 1e-2


@pytest.mark.parametrize("name", HOST_NAMES)
def test_stopping_after_attention_runs_no_unembedding(name: str) -> None:
    model = shared(name)
    fired: list[str] = []
    wrapped = wrap(model)
    hooks = [
        (
            "blocks.2.hook_mlp_out" if "attn_only" not in name else "ln_final.hook_normalized",
            lambda _: fired.append("mlp"),
        )
    ]
    if hooks[0][0] not in wrapped.hook_points:
        hooks = [("ln_final.hook_normalized", hooks[0][1])]
    if "no_norm" in name:
        hooks = [("blocks.2.hook_mlp_out", hooks[0][1])]
    assert wrapped.run(TOKENS, hooks=hooks, stop_after_attention=True) is None
    parallel = {"bridge:phi", "bridge:gptj", "bridge:gpt_neox", "bridge:falcon", "hooked:partial_rotary_parallel"}
    assert name in parallel or not fired
    assert wrapped.run(TOKENS, hooks=hooks) is not None
    assert fired


@pytest.mark.parametrize("name", HOST_NAMES)
def test_w_o_and_b_o_reproduce_the_output_projection(name: str) -> None:
    """z W_O + b_O is what comes out of the host's output projection, up to the post-norm of one HookedTransformer."""
    model = shared(name)
    wrapped = wrap(model)
    for layer, call in calls(model, TOKENS).items():
        out = torch.einsum("phd,hdm->pm", call.z[0], wrapped.w_o(layer))
        bias = wrapped.b_o(layer)
        out = out if bias is None else out + bias
        if name == "hooked:window_softcap":
            with pytest.raises(Exception, match="normalises the attention output"):
                wrapped.hook_name("attn_out", layer)
            continue
        own = host_values(model, TOKENS[0].tolist(), wrapped.hook_name("attn_out", layer).split(".", 2)[2])[layer]
        assert_agree(out, own, SUM)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_attention_input_times_weights_is_what_the_key_hook_shows(name: str) -> None:
    """x W_K + b_K = hook_k (before rotary and QK-norm), with x from `attention_input_hook`."""
    model = shared(name)
    wrapped = wrap(model)
    seen: dict[str, Tensor] = {}
    layer = 1

    def keep(key: str) -> Any:
        def store(tensor: Tensor) -> None:
            seen[key] = tensor

        return store

    hooks = [wrapped.attention_input_hook(layer, keep("x"))]
    hooks += [(wrapped.hook_name(kind, layer), keep(kind)) for kind in ("k", "v")]
    wrapped.run(TOKENS, hooks=hooks)
    attn = model.blocks[layer].attn
    for kind in ("k", "v"):
        grouped = name.startswith("hooked:") and wrapped.info.n_kv_heads != wrapped.info.n_heads
        w = getattr(attn, f"_W_{kind.upper()}" if grouped else f"W_{kind.upper()}")
        b = getattr(attn, f"_b_{kind.upper()}" if grouped else f"b_{kind.upper()}", None)
        heads = wrapped.info.n_kv_heads
        projected = torch.einsum("bpm,hmd->bphd", seen["x"], w)
        if b is not None:
            projected = projected + b
        shown = seen[kind].reshape(*seen[kind].shape[:2], heads, -1)
        assert_agree(projected, shown, SUM)


def test_windows_and_rules_of_layers() -> None:
    gemma = wrap(shared("bridge:gemma2"))
    assert [gemma.score_rule(i).window for i in range(3)] == [6, None, 6]
    assert gemma.score_rule(0).softcap == 2.0
    assert gemma.score_rule(0).scale == pytest.approx(5**-0.5)
    assert [wrap(shared("bridge:mistral")).score_rule(i).window for i in range(3)] == [6, 6, 6]
    gpt2 = wrap(shared("bridge:gpt2"))
    assert [gpt2.score_rule(i).scale for i in range(3)] == pytest.approx([8**-0.5 / (i + 1) for i in range(3)])
    neo = wrap(shared("bridge:gpt_neo"))
    assert [(neo.score_rule(i).scale, neo.score_rule(i).window) for i in range(3)] == [(1.0, None), (1.0, 6), (1.0, 6)]
    assert wrap(shared("bridge:gpt_oss")).score_rule(1).sinks is not None
    assert wrap(shared("bridge:bloom")).score_rule(1).alibi_slopes is not None


@pytest.mark.parametrize("name", sorted(NATIVE_ATTENTION))
def test_the_pattern_is_rebuilt_where_it_comes_after_z(name: str) -> None:
    assert not wrap(shared(name)).adapter.blocks[1].pattern_before_z
    assert wrap(shared("bridge:llama")).adapter.blocks[1].pattern_before_z


@requires_hooked
def test_hooked_transformer_and_bridge_agree_on_the_same_weights() -> None:
    """The bundled model, through TransformerLens's own weight conversion and through its bridge."""
    from metaopt_lens import decompose, load_tiny

    text = "apple : dax\nhammer : wug\npear : dax\npear :"
    bridge = decompose(load_tiny("bridge"), text, position="all")
    hooked = decompose(load_tiny("hooked"), text, position="all")
    assert bridge.tokenized == hooked.tokenized
    for form in ("softmax", "linear"):
        for part in ("zero_shot", "meta_gradient"):
            ours, theirs = (getattr(getattr(d, form), part) for d in (bridge, hooked))
            assert_agree(ours, theirs, PASS)
    assert bridge.effects.indirect is not None
    assert hooked.effects.indirect is not None
    assert_agree(bridge.effects.indirect, hooked.effects.indirect, PASS)
    assert_agree(bridge.effects.total, hooked.effects.total, PASS)


@requires_hooked
def test_gpt2_converted_by_transformer_lens_agrees_with_its_bridge() -> None:
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    from metaopt_lens import decompose

    hf_model = build_hf("gpt2", scale_attn_by_inverse_layer_idx=False)
    hooked = _empty_gpt2()
    hooked.load_state_dict(convert_gpt2_weights(hf_model, hooked.cfg), strict=False)
    with torch.no_grad():
        hooked.unembed.b_U.zero_()  # GPT-2 has none
    from families import bridge_of

    bridge = bridge_of(hf_model)
    with torch.no_grad():
        assert_agree(hooked(TOKENS), bridge(TOKENS), PASS)
    one, two = decompose(bridge, prompt()), decompose(hooked, prompt())
    assert_agree(one.softmax.meta_gradient, two.softmax.meta_gradient, PASS)
    assert_agree(one.softmax.zero_shot, two.softmax.zero_shot, PASS)
    assert_agree(one.linear.total, two.linear.total, PASS)
    assert_agree(one.z_position_matched, two.z_position_matched, PASS)


def _empty_gpt2() -> Any:
    from families import make_hooked

    return make_hooked("learned", act_fn="gelu_new", d_mlp=128, original_architecture="GPT2LMHeadModel", d_vocab_out=96)
