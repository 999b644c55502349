"""Momentum attention on any host: against hand-written transformers, hand-made hooks, and its own algebra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOOKED_NAMES, HOST_NAMES, build, build_hf, left_as_it_was, prompt, requires_hooked, shared, tokenized
from rounding import PASS, SUM, assert_agree, of_pass, rounding
from torch import Tensor

from metaopt_lens import Decomposition, KnockOut, MetaoptLensError, decompose, intervene, meta_gradient, wrap
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.interventions import MomentumAttention

IDS = [1, 30, 31, 3, 40, 41, 4, 50, 17, 52, 33, 9]
SOME = ["bridge:gpt2", "bridge:llama", "bridge:mistral", "bridge:bloom", "bridge:gpt_neox", *HOOKED_NAMES[:4]]
HEADS = torch.tensor([[0.0, 0.3, 0.6, 0.9], [0.5, 0.5, 0.0, 0.99], [0.2, 0.7, 0.8, 0.1]])
MOMENTUM = MomentumAttention(HEADS)


def logits(model: Any, ids: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(ids), **options)


def moving_average(v: Tensor, eta: Tensor) -> Tensor:
    """``[batch, pos, kv_head, d]`` and one eta per head, one token after the other."""
    v = v.repeat_interleave(len(eta) // v.shape[2], dim=2)
    average, out = torch.zeros_like(v[:, 0]), []
    for t in range(v.shape[1]):
        out.append(average)
        average = eta[:, None] * (average + v[:, t])
    return torch.stack(out, dim=1)


def by_hand(model: Any, ids: Sequence[int], eta: Tensor) -> Tensor:
    """Logits with the average added by the host's own hooks."""
    hooks: list[tuple[str, Any]] = []
    for layer in range(len(eta)):
        kept: dict[str, Tensor] = {}

        def keep(v: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
            kept["v"] = v

        def add(z: Tensor, hook: Any, kept: dict[str, Tensor] = kept, layer: int = layer) -> Tensor:
            return z + moving_average(kept["v"], eta[layer].to(z))

        hooks += [(f"blocks.{layer}.attn.hook_v", keep), (f"blocks.{layer}.attn.hook_z", add)]
    with torch.no_grad():
        return model.run_with_hooks(torch.tensor([list(ids)]), fwd_hooks=hooks)


# ---- the model itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOST_NAMES)
def test_every_host_computes_what_its_own_hooks_compute(name: str) -> None:
    model = shared(name)
    expected, plain = by_hand(model, IDS, HEADS), logits(model, [IDS])
    assert (expected - plain).abs().max() > 1e-2
    with left_as_it_was(model), intervene(model, MOMENTUM):
        found = logits(model, [IDS])
    assert_agree(found, expected, of_pass(name))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_eta_zero_is_plain_attention_bit_for_bit(name: str) -> None:
    model = shared(name)
    plain = logits(model, [IDS])
    with intervene(model, MomentumAttention(0.0)):
        assert torch.equal(logits(model, [IDS]), plain)
    partly = torch.zeros(3, 4)
    partly.requires_grad_()  # hooks are attached then
    with intervene(model, MomentumAttention(partly)):
        assert torch.equal(logits(model, [IDS]), plain)


def test_equals_a_hand_written_gpt2_with_momentum_attention() -> None:
    hf = build_hf("gpt2", dtype=torch.float64)
    model = build("bridge:gpt2", dtype=torch.float64)
    w = {name: p.detach() for name, p in hf.named_parameters()}
    eta, n, d_head = HEADS.double(), len(IDS), 8
    mask = torch.ones(n, n, dtype=torch.bool).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = w["transformer.wte.weight"][IDS] + w["transformer.wpe.weight"][:n]
    for layer in range(3):
        at = f"transformer.h.{layer}"
        qkv = norm(x, f"{at}.ln_1") @ w[f"{at}.attn.c_attn.weight"] + w[f"{at}.attn.c_attn.bias"]
        q, k, v = (t.view(n, 4, d_head).transpose(0, 1) for t in qkv.split(32, dim=-1))
        scores = q @ k.mT / math.sqrt(d_head) / (layer + 1)  # this config scales by the layer
        attention = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v
        decay = torch.zeros(4, n, n, dtype=torch.float64)
        for t in range(n):
            for i in range(t):
                decay[:, t, i] = eta[layer] ** (t - i)
        z = (attention + decay @ v).transpose(0, 1).reshape(n, 32)
        x = x + z @ w[f"{at}.attn.c_proj.weight"] + w[f"{at}.attn.c_proj.bias"]
        inner = norm(x, f"{at}.ln_2") @ w[f"{at}.mlp.c_fc.weight"] + w[f"{at}.mlp.c_fc.bias"]
        inner = torch.nn.functional.gelu(inner, approximate="tanh")
        x = x + inner @ w[f"{at}.mlp.c_proj.weight"] + w[f"{at}.mlp.c_proj.bias"]
    expected = norm(x, "transformer.ln_f") @ hf.lm_head.weight.detach().T
    with intervene(model, MOMENTUM):
        found = logits(model, [IDS])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_equals_a_hand_written_llama_with_momentum_attention() -> None:
    """Rotary positions, and two query heads on every key-value head."""
    hf = build_hf("llama")
    w = {name: p.detach() for name, p in hf.named_parameters()}
    n, d_head = len(IDS), 8
    angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(0, d_head, 2) / d_head)
    cos, sin = (f(torch.cat([angle, angle], dim=-1)) for f in (torch.cos, torch.sin))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]

    def rotate(t: Tensor) -> Tensor:
        half = torch.cat([-t[..., d_head // 2 :], t[..., : d_head // 2]], dim=-1)
        return t * cos[:, None] + half * sin[:, None]

    x = w["model.embed_tokens.weight"][IDS]
    for layer in range(3):
        at = f"model.layers.{layer}"
        a = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (a @ w[f"{at}.self_attn.{p}_proj.weight"].T).view(n, heads, d_head)
            for p, heads in (("q", 4), ("k", 2), ("v", 2))
        )
        q, k, v = rotate(q), rotate(k).repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d_head)
        pattern = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        z = torch.einsum("hqk,khd->qhd", pattern, v) + moving_average(v[None], HEADS[layer])[0]
        x = x + z.reshape(n, 32) @ w[f"{at}.self_attn.o_proj.weight"].T
        b = norm(x, f"{at}.post_attention_layernorm")
        gate, up, down = (w[f"{at}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(b @ gate.T) * (b @ up.T)) @ down.T
    expected = norm(x, "model.norm") @ hf.lm_head.weight.detach().T
    model = shared("bridge:llama")
    with intervene(model, MOMENTUM):
        assert_agree(logits(model, [IDS])[0], expected, PASS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = shared("bridge:llama", dtype)
    with intervene(model, MomentumAttention(0.5)):
        found = logits(model, [IDS])
    assert found.dtype == dtype
    expected = by_hand(shared("bridge:llama"), IDS, torch.full((3, 4), 0.5))
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


# ---- padding, prefixes, caches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_padded_batches_equal_their_rows(name: str) -> None:
    model, rows = shared(name), [IDS, IDS[3:], IDS[:5]]
    width = len(IDS)
    with intervene(model, MOMENTUM):
        alone = [logits(model, [row])[0] for row in rows]
        for side in ("left", "right"):
            pads = [[0] * (width - len(row)) for row in rows]
            left = side == "left"
            ids = [pad + row if left else row + pad for pad, row in zip(pads, rows, strict=True)]
            mask = [
                [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
                for pad, row in zip(pads, rows, strict=True)
            ]
            if left and name == "hooked:alibi":
                continue  # this host gives padded rows other distances, momentum or not
            batch = logits(model, ids, attention_mask=torch.tensor(mask))
            for row in range(3):
                assert_agree(batch[row][torch.tensor(mask[row]).bool()], alone[row], PASS)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_behind_a_shared_prefix(name: str) -> None:
    wrapped = wrap(shared(name))
    with intervene(wrapped, MOMENTUM):
        whole = logits(shared(name), [IDS])[:, 8:]
        prefix = wrapped.run_prefix(torch.tensor(IDS[:8]))
        behind = wrapped.run(torch.tensor([IDS[8:], IDS[8:]]), prefix=prefix)
    assert behind is not None
    assert_agree(behind, whole.expand(2, -1, -1), of_pass(name))


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "bridge:gpt_neox", "bridge:bloom"])
def test_a_users_own_cache_token_by_token(name: str) -> None:
    from transformers import DynamicCache

    model, cache = shared(name), DynamicCache()
    with intervene(model, MOMENTUM):
        whole = logits(model, [IDS])
        steps = [logits(model, [IDS[:4]], past_key_values=cache, use_cache=True)]
        steps += [logits(model, [[i]], past_key_values=cache, use_cache=True) for i in IDS[4:]]
    assert_agree(torch.cat(steps, dim=1), whole, PASS)


@pytest.mark.parametrize("name", ["bridge:mistral", "bridge:gemma2"])
def test_a_sliding_cache_forgets_but_momentum_remembers(name: str) -> None:
    from transformers import DynamicCache

    model = shared(name)
    config = model.original_model.config
    ids = (IDS * 2)[:20]  # window 6
    cache = DynamicCache(config=config)
    with intervene(model, MOMENTUM):
        whole = logits(model, [ids])
        steps = [logits(model, [ids[:9]], past_key_values=cache, use_cache=True)]
        steps += [logits(model, [[i]], past_key_values=cache, use_cache=True) for i in ids[9:]]
    assert_agree(torch.cat(steps, dim=1), whole, PASS)
    started = DynamicCache(config=config)
    logits(model, [ids[:12]], past_key_values=started, use_cache=True)
    with (
        pytest.raises(
            MetaoptLensError, match=r"holds \d of 12 past tokens \(sliding window\), and momentum needs them"
        ),
        intervene(model, MOMENTUM),
    ):
        logits(model, [[7]], past_key_values=started, use_cache=True)


@requires_hooked
@pytest.mark.parametrize("name", ["hooked:learned", "hooked:rotary"])
def test_generation_of_a_hooked_transformer(name: str) -> None:
    model, start = shared(name), torch.tensor([IDS[:6]])
    with intervene(model, MOMENTUM):
        made = model.generate(start, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
        one_by_one = start
        for _ in range(5):
            one_by_one = torch.cat([one_by_one, logits(model, one_by_one)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, one_by_one)


# ---- composition ------------------------------------------------------------------------------------------------


def random_update(model: Any) -> WeightUpdate:
    info, draw = wrap(model).info, torch.Generator().manual_seed(3)
    kv = (info.n_layers, info.n_kv_heads, info.d_model, info.d_head)
    out = (info.n_layers, info.n_heads, info.d_head, info.d_model)
    return WeightUpdate(info, w_v=0.05 * torch.randn(kv, generator=draw), w_o=0.05 * torch.randn(out, generator=draw))


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", *HOOKED_NAMES[:1]])
def test_values_changed_by_a_weight_update_are_averaged_in_any_order(name: str) -> None:
    model = shared(name)
    update = random_update(model)
    w_o = torch.stack([wrap(model).w_o(layer) for layer in range(3)])
    hooks: list[tuple[str, Any]] = []
    for layer in range(3):
        kept: dict[str, Tensor] = {}

        def x(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
            kept["x"] = value

        def v(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept, layer: int = layer) -> Tensor:
            assert update.w_v is not None
            kept["v"] = value + torch.einsum("bpm,hmd->bphd", kept["x"], update.w_v[layer])
            return kept["v"]

        def z(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept, layer: int = layer) -> Tensor:
            kept["z"] = value + moving_average(kept["v"], HEADS[layer])
            return kept["z"]

        def out(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept, layer: int = layer) -> Tensor:
            assert update.w_o is not None
            return value + torch.einsum("bphd,hdm->bpm", kept["z"], update.w_o[layer])

        input_hook = wrap(model).attention_input_hook(layer, lambda value, x=x: x(value, None))
        hooks += [(input_hook[0], lambda value, hook, f=input_hook[1]: f(value))]
        hooks += [(f"blocks.{layer}.attn.hook_v", v), (f"blocks.{layer}.attn.hook_z", z)]
        hooks += [(wrap(model).hook_name("attn_out", layer), out)]
    assert w_o.shape[1] == 4
    with torch.no_grad():
        expected = model.run_with_hooks(torch.tensor([IDS]), fwd_hooks=hooks)
    for order in ((update, MOMENTUM), (MOMENTUM, update)):
        with intervene(model, *order):
            assert_agree(logits(model, [IDS]), expected, PASS)
    with intervene(model, MOMENTUM), intervene(model, update):
        assert_agree(logits(model, [IDS]), expected, PASS)
    with intervene(model, update), intervene(model, MOMENTUM):
        assert_agree(logits(model, [IDS]), expected, PASS)


def test_finetuning_under_momentum_descends_the_gradient_of_the_model_with_momentum() -> None:
    model, lr = shared("bridge:llama"), 1e-3
    text = "w30 w31 : w40 w41 w50 w17"
    ids = torch.tensor([model.tokenizer(text).input_ids])
    ids = torch.cat([torch.tensor([[1]]), ids], dim=1) if int(ids[0, 0]) != 1 else ids
    with intervene(model, MOMENTUM):
        update = finetune(model, [text], lr=lr, progress=False)

        def loss(scale: float) -> float:
            with (scale * update).applied(model):
                out = logits(model, ids)
            return float(torch.nn.functional.cross_entropy(out[0, :-1].double(), ids[0, 1:]))

        slope = (loss(1.0) - loss(-1.0)) / 2
    expected = -(update.norm() ** 2) / lr  # along dW = -lr g the loss changes by -|dW|^2 / lr
    assert abs(slope / expected - 1) < 2e-2


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "bridge:mistral", "bridge:bloom", *HOOKED_NAMES[:4]])
def test_a_meta_gradient_brings_its_share_of_the_average(name: str) -> None:
    model = shared(name)
    tokens = tokenized(model, prompt())
    zero_shot = tokens.zero_shot()
    n = len(tokens.query)
    with intervene(model, MOMENTUM):
        made = meta_gradient(model, prompt())
        full = logits(model, [tokens.ids])[0, -n:]
    with intervene(model, made, MOMENTUM):
        merged = logits(model, [zero_shot.ids])[0, -n:]
    assert_agree(merged, full, PASS)
    with intervene(model, made):
        assert (logits(model, [zero_shot.ids])[0, -n:] - full).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", *HOOKED_NAMES[:1]])
def test_knocking_out_all_heads_takes_the_share_away(name: str) -> None:
    """Then it is the position-matched zero-shot run, which a meta-gradient of strength 0 also gives."""
    model = shared(name)
    tokens = tokenized(model, prompt())
    n = len(tokens.query)
    with intervene(model, KnockOut(prompt()), MOMENTUM):
        knocked_out = logits(model, [tokens.ids])[0, -n:]
    with intervene(model, 0.0 * meta_gradient(model, prompt()), MOMENTUM):
        matched = logits(model, [tokens.zero_shot().ids])[0, -n:]
    assert_agree(knocked_out, matched, PASS)
    with intervene(model, KnockOut(prompt(), heads=["L0H1"]), MOMENTUM):
        one = logits(model, [tokens.ids])[0, -n:]
    with intervene(model, MOMENTUM):
        none = logits(model, [tokens.ids])[0, -n:]
    assert 1e-4 < (one - none).abs().max() < (knocked_out - none).abs().max()


def test_momentum_that_is_on_already_is_not_undone() -> None:
    model = shared("bridge:gpt2")
    for other in (KnockOut(prompt()), meta_gradient(model, prompt())):
        with (
            pytest.raises(MetaoptLensError, match=r"would undo it: give both to the same intervene"),
            intervene(model, MOMENTUM),
            intervene(model, other),
        ):
            pass


def test_chosen_heads_and_several_momenta() -> None:
    model = shared("bridge:gpt2")
    some = torch.zeros(3, 4)
    some[0, 1], some[2, 3] = 0.5, 0.9
    per_layer = torch.tensor([0.1, 0.2, 0.3])[:, None].expand(3, 4)
    for momenta, etas in (
        ((MomentumAttention(0.5, heads=["L0H1"]), MomentumAttention(0.9, heads="L2H3")), some),
        ((MomentumAttention([0.1, 0.2, 0.3]),), per_layer),
    ):
        expected = by_hand(model, IDS, etas)
        with intervene(model, *momenta):
            assert_agree(logits(model, [IDS]), expected, PASS)


# ---- learning eta -----------------------------------------------------------------------------------------------


def test_gradient_reaches_eta() -> None:
    model = shared("hooked:learned" if HOOKED_NAMES else "bridge:gpt2", torch.float64)
    eta = HEADS.double().requires_grad_()

    def loss(rates: Tensor) -> Tensor:
        with intervene(wrap(model), MomentumAttention(rates)):
            return model(torch.tensor([IDS]))[0, -1, 7]

    (gradient,) = torch.autograd.grad(loss(eta), eta)
    with torch.no_grad():
        for at in ((0, 1), (1, 3), (2, 2)):
            step = torch.zeros(3, 4, dtype=torch.float64)
            step[at] = 1e-6
            slope = (loss(eta + step) - loss(eta - step)) / 2e-6
            assert abs(float(slope - gradient[at])) < 1e-5 * max(1.0, abs(float(slope)))


# ---- decompose --------------------------------------------------------------------------------------------------


def split(name: str, **options: Any) -> Decomposition:
    return decompose(shared(name), prompt(), position="all", momentum=MOMENTUM, **options)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_three_parts_sum_to_z_and_demonstrations_to_their_share(name: str) -> None:
    result = split(name, zero_shot_runs="none")
    softmax = result.softmax
    assert result.momentum.abs().max() > 1e-2
    assert_agree(softmax.zero_shot + softmax.meta_gradient + result.momentum, result.z, of_pass(name))
    assert_agree(result.momentum_per_demo().sum(-2), result.momentum_meta_gradient, SUM)
    # by hand, for one head and position
    layer, head, at = 1, 3, 2
    t = result.positions[at]
    v = result.runs.icl.v_of(layer)[:, head // (4 // result.model.n_kv_heads)]
    inside = range(result.demonstrations.start, result.demonstrations.stop)
    by_sum = sum(HEADS[layer, head] ** (t - i) * v[i] for i in inside)
    assert_agree(result.momentum_meta_gradient[at, layer, head], by_sum, SUM)
    everything = sum(HEADS[layer, head] ** (t - i) * v[i] for i in range(t))
    assert_agree(result.momentum[at, layer, head], everything, SUM)


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:mistral", *HOOKED_NAMES[:2]])
def test_seen_by_itself_when_it_is_on(name: str) -> None:
    model = shared(name)
    given = split(name)
    with intervene(model, MOMENTUM):
        found = decompose(model, prompt(), position="all")
    assert torch.equal(found.z, given.z)
    assert torch.equal(found.momentum, given.momentum)
    assert decompose(model, prompt()).eta is None


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", *HOOKED_NAMES[:1]])
def test_zero_shot_runs_under_momentum(name: str) -> None:
    model, result = shared(name), split(name)
    tokens = result.tokenized
    n = len(tokens.query)

    def host_z(ids: Sequence[int], *interventions: Any) -> Tensor:
        seen: dict[int, Tensor] = {}
        hooks = [
            (wrap(model).hook_name("z", layer), lambda z, layer=layer: seen.__setitem__(layer, z[0, -n:].clone()))
            for layer in range(3)
        ]
        with intervene(model, *interventions), wrap(model).hooked(hooks):
            logits(model, [list(ids)])
        return torch.stack([seen[layer] for layer in range(3)], dim=1)

    assert result.z_zero_shot is not None
    assert result.z_position_matched is not None
    assert_agree(result.z, host_z(tokens.ids, MOMENTUM), PASS)
    assert_agree(result.z_zero_shot, host_z(tokens.zero_shot().ids, MOMENTUM), PASS)
    assert_agree(result.z_position_matched, host_z(tokens.ids, KnockOut(prompt()), MOMENTUM), PASS)
    effects = result.effects
    assert effects.indirect is not None
    assert effects.position is not None
    runs = (result.z, result.z_zero_shot, result.z_position_matched)
    assert_agree(effects.direct + effects.indirect + effects.position, result.z - result.z_zero_shot, SUM, of=runs)
    assert effects.indirect[:, 0].abs().max() <= rounding(PASS, *runs)
    assert_agree(effects.direct, result.softmax.update + result.momentum_meta_gradient, SUM, of=runs)


def test_without_demos_is_not_renormalised_by_momentum() -> None:
    """In the first layer, where the inputs are the same, z_without is that of plain attention."""
    plain = decompose(shared("bridge:gpt2"), prompt(), position="all").softmax.without_demos
    assert_agree(split("bridge:gpt2").softmax.without_demos[:, 0], plain[:, 0], PASS)


def test_residual_frame_repr_and_file(tmp_path: Path) -> None:
    model, result = shared("bridge:gpt2"), split("bridge:gpt2")
    outputs: dict[int, Tensor] = {}
    hooks = [
        (wrap(model).hook_name("attn_out", layer), lambda out, layer=layer: outputs.__setitem__(layer, out[0].clone()))
        for layer in range(3)
    ]
    with intervene(model, MOMENTUM), wrap(model).hooked(hooks):
        logits(model, [result.tokenized.ids])
    expected = torch.stack([outputs[layer][result.tokenized.query.slice] for layer in range(3)], dim=1)
    assert_agree(result.residual.attention_output, expected, PASS)
    frame = result.to_frame()
    assert {"eta", "momentum_norm", "momentum_meta_gradient_norm"} <= set(frame.columns)
    row = frame[(frame["name"] == "L1H3") & (frame["position"] == result.positions[0])].iloc[0]
    assert row["eta"] == pytest.approx(0.99)
    assert row["momentum_norm"] == pytest.approx(float(result.momentum[0, 1, 3].norm()), rel=rounding(SUM, 1.0))
    assert row["z_norm"] == pytest.approx(float(result.z[0, 1, 3].norm()), rel=rounding(SUM, 1.0))
    assert "momentum attention (eta up to 0.99)" in repr(result)
    result.save(tmp_path / "split")
    loaded = Decomposition.load(tmp_path / "split")
    assert torch.equal(loaded.momentum, result.momentum)
    plain = decompose(model, prompt())
    assert "momentum_norm" not in plain.to_frame().columns
    assert not plain.momentum.any()


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, -0.1, float("nan"), [0.1, 1.2, 0.3]])
def test_eta_out_of_range_is_refused_where_it_is_made(eta: Any) -> None:
    with pytest.raises(MetaoptLensError, match="eta must be at least 0 and less than 1"):
        MomentumAttention(eta)


@pytest.mark.parametrize("eta", [[0.1, 0.2], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], [[0.1] * 4] * 2])
def test_wrong_number_of_etas(eta: Any) -> None:
    with (
        pytest.raises(MetaoptLensError, match=r"one number, 3 \(one per layer\) or \[3, 4\] \(layers x heads\)"),
        intervene(shared("bridge:gpt2"), MomentumAttention(eta)),
    ):
        pass


def test_unknown_heads_and_two_etas_on_one_head() -> None:
    model = shared("bridge:gpt2")
    with (
        pytest.raises(MetaoptLensError, match="there is no head L3H0"),
        intervene(model, MomentumAttention(0.5, heads=["L3H0"])),
    ):
        pass
    with (
        pytest.raises(MetaoptLensError, match="two momentum attentions act on head L0H1"),
        intervene(model, MOMENTUM, MomentumAttention(0.5, heads=["L0H1"])),
    ):
        pass
    with (
        pytest.raises(MetaoptLensError, match="two momentum attentions act on head L0H1"),
        intervene(model, MOMENTUM),
    ):
        decompose(model, prompt(), momentum=MomentumAttention(0.1))
