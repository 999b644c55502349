"""Applying a meta-gradient to zero-shot passes the user makes on the host: the in-context run, exactly."""

from __future__ import annotations

import json
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import FORGETFUL, HOOKED_NAMES, HOST_NAMES, NATIVE_NAMES, build, left_as_it_was, prompt, shared, tokenized
from rounding import PASS, STEP, assert_agree, of_pass, rounding
from torch import Tensor

from metaopt_lens import ICLPrompt, KnockOut, MetaGradient, MetaoptLensError, Template, intervene, meta_gradient, wrap
from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.models.tiny import load_tiny
from metaopt_lens.runs import score_candidates

QUERIES = ("w16 w17 :", "w40 :", "w31 w90 w16 w60 :")
# transformers' mixture-of-experts kernels have no float64.
NO_DOUBLE = {"bridge:gpt_oss", "bridge:mixtral"}
# The other bridges drop to float32 inside transformers (norms, softmax, rotary tables) whatever the dtype.
DOUBLE = {
    *("bridge:gpt2", "bridge:gpt_bigcode", "bridge:gpt_neox", "bridge:gpt_neox_sequential", "bridge:falcon"),
    *NATIVE_NAMES,
    *HOOKED_NAMES,
}
SOME = ["bridge:gpt2", "bridge:mistral", "bridge:bloom", "bridge:gpt_oss", *HOOKED_NAMES[1:4:2]]


@cache
def made(name: str, dtype: torch.dtype = torch.float32) -> MetaGradient:
    return meta_gradient(shared(name, dtype), prompt())


def ids(name: str, query: str) -> tuple[list[int], list[int]]:
    """The prompt in context and without demonstrations."""
    tokens = tokenized(shared(name), prompt(query=query))
    return list(tokens.ids), list(tokens.zero_shot().ids)


def logits(model: Any, tokens: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options)


def merge_error(name: str, dtype: torch.dtype) -> float:
    """The largest error; in float32 in units of rounding of the logits."""
    model, worst = shared(name, dtype), 0.0
    for query in QUERIES:
        full, zero_shot = ids(name, query)
        n = len(zero_shot) - made(name).tokens.start
        with intervene(model, made(name, dtype)):
            merged = logits(model, [zero_shot])[0, -n:]
        expected = logits(model, [full])[0, -n:]
        plain = logits(model, [zero_shot])[0, -n:]
        assert (plain - expected).abs().max() > 1e-2  # there is something to reproduce
        size = rounding(1, expected) if dtype == torch.float32 else 1.0
        worst = max(worst, float((merged - expected).abs().max()) / size)
    return worst


# ---- the merge identity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOST_NAMES)
def test_merge_on_all_heads_is_the_in_context_run(name: str) -> None:
    assert merge_error(name, torch.float32) <= of_pass(name)


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name not in NO_DOUBLE])
def test_merge_in_float64(name: str) -> None:
    error = merge_error(name, torch.float64)
    assert error < (1e-9 if name in DOUBLE else 1e-5)
    assert (error < 1e-9) == (name in DOUBLE)  # the list of families is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["bridge", *(["hooked"] if HOOKED_NAMES else [])])
def test_merge_on_the_bundled_model(backend: str, dtype: torch.dtype) -> None:
    model = load_tiny(backend, dtype=dtype)
    text = ICLPrompt.from_string("apple : dax\nhammer : wug\npear : dax\nsaw : wug\ncherry :")
    tokens = tokenized(model, text)
    expected = logits(model, [tokens.ids])[0, -1]
    with intervene(model, meta_gradient(model, text)):
        merged = logits(model, [tokens.zero_shot().ids])[0, -1]
    if dtype == torch.float32:
        assert_agree(merged, expected, PASS)
    else:
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-9 if backend == "hooked" else 1e-5)
    assert model.tokenizer.decode([int(merged.argmax())]).strip() == "dax"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", HOST_NAMES)
def test_padded_batches(name: str, side: str) -> None:
    model = shared(name)
    pairs = [ids(name, query) for query in QUERIES]
    width = max(len(zero_shot) for _, zero_shot in pairs)
    tokens, mask = torch.zeros(2, len(pairs), width, dtype=torch.long)
    for row, (_, zero_shot) in enumerate(pairs):
        at = slice(width - len(zero_shot), width) if side == "left" else slice(len(zero_shot))
        tokens[row, at], mask[row, at] = torch.tensor(zero_shot), 1
    with intervene(model, made(name)):
        merged = logits(model, tokens, attention_mask=mask)
    assert torch.isfinite(merged).all()
    for row, (full, zero_shot) in enumerate(pairs):
        last = width - 1 if side == "left" else len(zero_shot) - 1
        assert_agree(merged[row, last], logits(model, [full])[0, -1], of_pass(name))


GENERATING = [(name, cached) for name in HOST_NAMES for cached in (True, False) if not (cached and name in FORGETFUL)]


@pytest.mark.skipif(not FORGETFUL, reason="since TransformerLens 4 every bridge keeps its cache")
def test_cached_generation_is_refused_where_the_bridge_ignores_the_cache() -> None:
    (name,) = FORGETFUL
    zero_shot = torch.tensor([ids(name, QUERIES[0])[1]])
    with (
        intervene(shared(name), made(name)),
        pytest.raises(UnsupportedModelError, match=r"its bridge ignores the cache.* \(use_past_kv_cache=False\)"),
    ):
        shared(name).generate(zero_shot, max_new_tokens=3, verbose=False)


@pytest.mark.parametrize(("name", "cached"), GENERATING)
def test_generation(name: str, cached: bool) -> None:
    model = shared(name)
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False}
    full, zero_shot = (torch.tensor([tokens]) for tokens in ids(name, QUERIES[0]))
    expected = model.generate(full, use_past_kv_cache=cached, return_type="tokens", **options)[0, -8:]
    with intervene(model, made(name)):
        merged = model.generate(zero_shot, use_past_kv_cache=cached, return_type="tokens", **options)[0, -8:]
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name.startswith("bridge:")])
def test_generation_by_transformers_with_sliding_caches_and_padding(name: str) -> None:
    model = shared(name)
    pairs = [ids(name, query) for query in QUERIES]

    def generate(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        tokens, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for row, sequence in enumerate(rows):
            tokens[row, width - len(sequence) :], mask[row, width - len(sequence) :] = torch.tensor(sequence), 1
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        return model.original_model.generate(tokens, attention_mask=mask, **options)[:, -8:]

    expected = torch.cat([generate([full]) for full, _ in pairs])
    with intervene(model, made(name)):
        merged = generate([zero_shot for _, zero_shot in pairs])
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_run_behind_the_hosts_own_cache(name: str) -> None:
    """The mode that needs no moving of positions."""
    full, zero_shot = ids(name, QUERIES[0])
    start = made(name).tokens.start
    found = made(name).run(shared(name), torch.tensor([zero_shot[start:]]))
    assert found is not None
    assert_agree(found[0, -1], logits(shared(name), [full])[0, -1], of_pass(name))


# ---- heads, demonstrations, strength ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_some_heads_are_the_in_context_run_with_the_others_knocked_out(name: str) -> None:
    model, mg = shared(name), made(name)
    full, zero_shot = ids(name, QUERIES[0])
    heads = ["L0H1", "L1H3", "L2H0"]
    others = [f"L{i}H{j}" for i in range(3) for j in range(4) if f"L{i}H{j}" not in heads]
    with intervene(model, mg.select(heads)):
        merged = logits(model, [zero_shot])[0, -1]
    with intervene(model, KnockOut(mg, heads=others)):
        expected = logits(model, [full])[0, -1]
    assert_agree(merged, expected, PASS)
    with intervene(model, mg):
        assert (logits(model, [zero_shot])[0, -1] - merged).abs().max() > 1e-3


@pytest.mark.parametrize("name", SOME)
def test_leaving_a_demonstration_out_is_the_in_context_run_with_it_hidden(name: str) -> None:
    model, mg = shared(name), made(name)
    full, zero_shot = ids(name, QUERIES[0])
    with intervene(model, mg.without_demo(3)):
        merged = logits(model, [zero_shot])[0, -1]
    with intervene(model, KnockOut(mg, demos=[3])):
        expected = logits(model, [full])[0, -1]
    assert_agree(merged, expected, PASS)
    with intervene(model, mg):
        assert (logits(model, [zero_shot])[0, -1] - merged).abs().max() > 1e-3
    assert mg.without_demo(3).select(demos=[0, 1]).chosen == (0, 1)
    rerun = meta_gradient(model, prompt().without_demo(3))
    with intervene(model, rerun):
        again = logits(model, [zero_shot])[0, -1]
    assert torch.isfinite(again).all()  # another quantity, also offered


@pytest.mark.parametrize("name", SOME)
def test_at_strength_0_it_is_the_position_matched_zero_shot_run(name: str) -> None:
    model, mg = shared(name), made(name)
    full, zero_shot = ids(name, QUERIES[0])
    with intervene(model, 0.0 * mg):
        none = logits(model, [zero_shot])[0, -1]
    with intervene(model, KnockOut(mg)):
        assert_agree(none, logits(model, [full])[0, -1], PASS)


@pytest.mark.parametrize("form", ["softmax", "linear"])
def test_strength_scales_the_change_of_z(form: str) -> None:
    model, mg = shared("bridge:llama"), made("bridge:llama")
    zero_shot = torch.tensor([ids("bridge:llama", QUERIES[0])[1]])
    found = {}
    for strength in (0.0, 0.5, 1.0):
        with intervene(model, mg.apply(form, heads=["L1H2"], strength=strength)):
            _, store = model.run_with_cache(zero_shot)
            found[strength] = store["blocks.1.attn.hook_z"][0, :, 2]
    whole, half = found[1.0] - found[0.0], found[0.5] - found[0.0]
    assert_agree(half, 0.5 * whole, 2 * STEP, of=tuple(found.values()))
    assert whole[-1].abs().max() > 1e-3
    assert not whole[: mg.tokens.start].any()  # S does not see the demonstrations


def test_linear_form_adds_dw_q_at_the_stated_scale() -> None:
    model, mg = shared("bridge:gpt2"), made("bridge:gpt2")
    zero_shot = torch.tensor([ids("bridge:gpt2", QUERIES[0])[1]])
    found = {}
    for strength in (0.0, 1.0):
        with intervene(model, mg.apply("linear", heads="L0H1", strength=strength, scale=0.03)):
            _, store = model.run_with_cache(zero_shot)
            found[strength] = store["blocks.0.attn.hook_z"][0]
    q = store["blocks.0.attn.hook_q"][0, -1, 1]
    change = found[1.0] - found[0.0]
    assert_agree(change[-1, 1], 0.03 * (mg.delta_w(0, 1).AB @ q), 2 * STEP, of=tuple(found.values()))
    assert not change[:, [0, 2, 3]].any()


def test_gradients_flow_through_the_merge() -> None:
    """Also where a window hides all demonstrations: no NaN."""
    model = shared("bridge:mistral")
    wrapped, mg = wrap(model), made("bridge:mistral")
    tokens = torch.tensor([ids("bridge:mistral", "w31 w90 w16 w60 w61 w62 w63 w64 :")[1]])
    out = wrapped.run(tokens, hooks=mg.hooks(wrapped), grad=True)
    assert out is not None
    weight = model.original_model.model.layers[0].self_attn.q_proj.weight
    if not weight.requires_grad:
        pytest.skip("weights are frozen here")
    (gradient,) = torch.autograd.grad(out[0, -1, 7], [weight])
    assert torch.isfinite(gradient).all()
    assert gradient.any()


# ---- in company -------------------------------------------------------------------------------------------------


def small_update(model: Any) -> WeightUpdate:
    info = wrap(model).info
    shape = (info.n_layers, info.n_kv_heads, info.d_model, info.d_head)
    generator = torch.Generator().manual_seed(3)
    return WeightUpdate(info, w_k=0.1 * torch.randn(shape, generator=generator), w_v=0.1 * torch.randn(shape))


@pytest.mark.parametrize("name", SOME)
def test_with_a_weight_update(name: str) -> None:
    """Whatever the order: the update changes keys and values first."""
    model = shared(name)
    update = small_update(model)
    full, zero_shot = ids(name, QUERIES[0])
    with intervene(model, update):
        mg = meta_gradient(model, prompt())
        expected = logits(model, [full])[0, -1]
    for order in ((update, mg), (mg, update)):
        with intervene(model, *order):
            merged = logits(model, [zero_shot])[0, -1]
        assert_agree(merged, expected, PASS)
    assert (expected - logits(model, [full])[0, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", SOME)
def test_with_the_users_own_hooks(name: str) -> None:
    model = shared(name)
    full, zero_shot = ids(name, QUERIES[0])

    def push(residual: Tensor, hook: Any) -> Tensor:
        residual = residual.clone()
        residual[:, -2:] += 0.3
        return residual

    def halve(z: Tensor, hook: Any) -> Tensor:
        return z * 0.5

    hooks = [("blocks.1.hook_resid_pre", push), ("blocks.2.attn.hook_z", halve)]
    expected = model.run_with_hooks(torch.tensor([full]), fwd_hooks=hooks)[0, -1]
    with intervene(model, made(name)):
        merged = model.run_with_hooks(torch.tensor([zero_shot]), fwd_hooks=hooks)[0, -1]
    assert_agree(merged, expected, PASS)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_the_model_comes_back_as_it_was(name: str) -> None:
    model = shared(name)
    zero_shot = ids(name, QUERIES[0])[1]
    with left_as_it_was(model):
        mg = meta_gradient(model, prompt())
        with intervene(model, mg):
            logits(model, [zero_shot])
        with pytest.raises(KeyboardInterrupt), intervene(model, mg):  # noqa: PT012
            logits(model, [zero_shot])
            raise KeyboardInterrupt


# ---- storing, and bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:llama", *HOOKED_NAMES[1:2]])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    mg = made(name).select(["L0H1", "L2H2"], demos=[0, 2]).scaled(0.7)
    mg.save(tmp_path / "mg")
    loaded = MetaGradient.load(tmp_path / "mg")
    for field in ("template", "instruction", "demos", "tokens", "chosen", "strength", "model", "fingerprint"):
        assert getattr(loaded, field) == getattr(mg, field)
    assert loaded.provenance == mg.provenance == made(name).provenance
    for one, other in ((loaded.k, mg.k), (loaded.v, mg.v), (loaded.host_k, mg.host_k), (loaded.heads, mg.heads)):
        assert one is other is None or torch.equal(one, other)
    zero_shot = ids(name, QUERIES[0])[1]
    found = []
    for value in (mg, loaded):
        with intervene(shared(name), value):
            found.append(logits(shared(name), [zero_shot]))
    assert torch.equal(*found)
    assert loaded.run(shared(name), torch.tensor([[16, 3]])) is not None
    assert "2 of 4 demonstrations" in repr(loaded)
    assert "2 of 12 heads, strength 0.7" in repr(loaded)


def test_from_demos_and_template_or_from_a_prompt() -> None:
    model, text = shared("bridge:gpt2"), prompt()
    same = meta_gradient(model, text.demos, template=text.template, instruction=text.instruction)
    assert torch.equal(same.k, made("bridge:gpt2").k)
    assert same.prompt("w16").demos == text.demos
    with pytest.raises(MetaoptLensError, match="brings its own template"):
        meta_gradient(model, text, template=Template())
    with pytest.raises(MetaoptLensError, match="no demonstrations: a meta-gradient needs at least one"):
        meta_gradient(model, [])


def test_refuses_another_models_meta_gradient() -> None:
    mg = made("bridge:gpt2")
    zero = torch.tensor([[1, 16]])
    with pytest.raises(MetaoptLensError, match="n_kv_heads = 4"), intervene(shared("bridge:llama"), mg):
        pass
    with pytest.raises(MetaoptLensError, match=r"dtype = float32.*dtype = float64"):
        mg.run(shared("bridge:gpt2", torch.float64), zero)
    with (
        pytest.raises(MetaoptLensError, match="made with other weights"),
        intervene(build("bridge:gpt2", seed=5), mg),
    ):
        pass
    with pytest.raises(MetaoptLensError, match="template"):
        mg.check_prompt(ICLPrompt(prompt().demos, "w16", Template(separator=" w5 "), prompt().instruction))


def test_refuses_bad_selections() -> None:
    mg = made("bridge:gpt2")
    with pytest.raises(MetaoptLensError, match="no head L3H0: the model has layers 0 to 2"):
        mg.select(["L3H0"])
    with pytest.raises(MetaoptLensError, match="the selection is empty"):
        mg.select([])
    with pytest.raises(MetaoptLensError, match="the selection is empty"):
        mg.select(["L0H1"]).select(["L0H2"])
    with pytest.raises(MetaoptLensError, match="no demonstration 4: there are 4, counted from 0"):
        mg.without_demo(4)
    with pytest.raises(MetaoptLensError, match="the selection is empty: name at least one demonstration"):
        mg.select(demos=[1]).without_demo(1)
    with pytest.raises(MetaoptLensError, match="form must be 'softmax' or 'linear'"):
        mg.apply("cubic")
    with pytest.raises(MetaoptLensError, match="scale belongs to form='linear'"):
        mg.apply(scale=2.0)
    model = shared("bridge:gpt2")
    with pytest.raises(MetaoptLensError, match="only one meta-gradient"), intervene(model, mg, 0.5 * mg):
        pass


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:bloom", *HOOKED_NAMES[:2]])
def test_refuses_passes_that_do_not_begin_with_s_or_run_past_the_window(name: str) -> None:
    model, mg = shared(name), made(name)
    with intervene(model, mg):
        with pytest.raises(MetaoptLensError, match=r"must begin with S.*\[1, 20, 21, 4\].*begins with \[16, 17"):
            logits(model, [[16, 17, 3, 40]])
        n_ctx = wrap(model).info.n_ctx
        if name != "bridge:bloom":  # ALiBi: no window but the one the configuration states
            with pytest.raises(MetaoptLensError, match=f"the context window of .* is {n_ctx}"):
                logits(model, [[1, 20, 21, 4] + [16] * (n_ctx - 5)])


def test_refuses_a_host_whose_tokens_cannot_be_moved() -> None:
    model = build("bridge:gpt2")
    mg = meta_gradient(model, prompt())
    hf = model.original_model

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        return type(self).forward(self, input_ids, attention_mask=attention_mask, **options)

    hf.forward = types.MethodType(forward, hf)
    with (
        pytest.raises(MetaoptLensError, match=r"takes no position_ids.*MetaGradient\.run\(model, tokens\)"),
        intervene(model, mg),
    ):
        pass
    assert mg.run(model, torch.tensor([[16, 3]])) is not None


def test_refuses_a_host_that_ignores_the_positions_it_is_given() -> None:
    model = build("bridge:llama")
    mg = meta_gradient(model, prompt())
    rotary = model.original_model.model.rotary_emb

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        return type(self).forward(self, x, torch.arange(x.shape[1])[None])

    component = rotary.original_component if "original_component" in dir(rotary) else rotary
    component.forward = types.MethodType(forward, component)
    with (
        pytest.raises(MetaoptLensError, match=r"does not compute with the positions.*MetaGradient\.run\(model, tokens"),
        intervene(model, mg),
    ):
        pass


# ---- shared prefixes, half precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_behind_a_shared_s(name: str) -> None:
    """Zero-shot queries behind S, run once: the batched evaluation of the library takes a meta-gradient as hooks."""
    model, mg = shared(name), made(name)
    wrapped = wrap(model)
    start = mg.tokens.start
    before = wrapped.run_prefix(torch.tensor(mg.tokens.ids[:start]))
    queries = [ids(name, query)[1][start:] for query in QUERIES]
    labels = [(32,), (36, 37), (40,)]
    found = score_candidates(wrapped, before, queries, labels, hooks=mg.hooks(wrapped))
    expected = score_candidates(wrapped, mg.prefix, queries, labels)
    assert_agree(found, expected, PASS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOME)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = shared(name, dtype)
    mg = meta_gradient(model, prompt())
    full, zero_shot = ids(name, QUERIES[0])
    expected = logits(model, [full])[0, -1].float()
    with intervene(model, mg):
        merged = logits(model, [zero_shot])[0, -1]
    assert merged.dtype == dtype
    with intervene(model, mg.apply("linear", heads=["L0H0"])):
        assert torch.isfinite(logits(model, [zero_shot])).all()
    rounding = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(merged.float(), expected, rtol=0, atol=rounding * float(expected.abs().max()))
    with intervene(model, KnockOut(mg)):
        without = logits(model, [full])[0, -1].float()
    assert torch.isfinite(without).all()
    assert (without - expected).abs().max() > 5 * (merged.float() - expected).abs().max()


# ---- fingerprints of all weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", *HOOKED_NAMES[:1]])
def test_a_single_changed_weight_of_any_matrix_is_seen(name: str) -> None:
    """0.1 looked at W_O only: other keys or values went unnoticed, logits off by 0.8."""
    mg = meta_gradient(shared(name), prompt())
    model = build(name)
    mg.check_model(wrap(model))  # the same weights, built again
    for parameter in model.parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[(0,) * (parameter.ndim - 1)][1] += 0.5
            wrapped = wrap(model)
            with pytest.raises(MetaoptLensError, match=r"made with other weights .* differs"):
                mg.check_model(wrapped)
            parameter.copy_(before)


def test_swapped_rows_of_the_value_projection_are_seen() -> None:
    mg, model = meta_gradient(shared("bridge:llama"), prompt()), build("bridge:llama")
    weight = dict(model.named_parameters())
    name = next(n for n in sorted(weight) if "v_proj" in n and n.endswith("weight"))
    with torch.no_grad():
        weight[name].copy_(weight[name].flip(0).clone())
    with pytest.raises(MetaoptLensError, match=f"{name.split('.')[-2]}.* differs"):
        mg.check_model(wrap(model))


def test_a_weight_changed_behind_autograd_is_seen_at_the_next_intervene() -> None:
    """Tensors count their changes, but not those made through ``.data`` or NumPy."""
    model = build("bridge:llama")
    mg = meta_gradient(model, prompt())
    weight = dict(model.named_parameters())
    value = next(weight[n] for n in sorted(weight) if "v_proj" in n and n.endswith("weight"))
    version, before = value._version, value.detach().clone()
    for change in (
        lambda: value.data[3, 5].add_(0.5),
        lambda: value.detach().numpy().__setitem__((0, 0), 1.5),
        lambda: value.data.copy_(value.data.flip(0).clone()),
    ):
        with intervene(model, mg):
            pass
        change()
        assert value._version == version  # no cache could tell
        with pytest.raises(MetaoptLensError, match=r"made with other weights .* differs"), intervene(model, mg):
            pass
        value.data.copy_(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, 7, 121, 1000])
def test_checksums_differ_whatever_number_is_changed(dtype: torch.dtype, size: int) -> None:
    from metaopt_lens.models._checksum import checksum

    whole = (100 * torch.rand(size + 1, generator=torch.Generator().manual_seed(size))).to(dtype)
    values = whole[1:]  # not aligned to words
    for index in range(size):
        changed = values.clone()
        changed[index] += 1
        assert int(checksum(changed)) != int(checksum(values))
    assert int(checksum(values)) == int(checksum(values.clone()))


def test_a_file_of_version_0_1_is_refused_with_the_reason(tmp_path: Path) -> None:
    made("bridge:gpt2").save(tmp_path / "mg")
    file = tmp_path / "mg.json"
    meta = json.loads(file.read_text())
    meta["fingerprint"] = [0.25, 1.5] * 3  # two numbers a layer, as 0.1 wrote them
    file.write_text(json.dumps(meta))
    with pytest.raises(MetaoptLensError, match=r"saved by metaopt-lens 0\.1.*output projections only.*new one"):
        MetaGradient.load(tmp_path / "mg")
