"""Updates as values: algebra, application, factors, heads, files; and everything that is refused."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import build, host_values, left_as_it_was, requires_hooked, shared
from safetensors.torch import load_file
from torch import Tensor

from metaopt_lens import HeadRef, ICLPrompt, MetaoptLensError
from metaopt_lens.finetuning import FinetuneSettings, WeightUpdate, finetune
from metaopt_lens.interventions import intervene
from metaopt_lens.models import ProcessedWeightsWarning, wrap

F64 = torch.float64
DEMOS = [("w30 w31", "w32"), ("w34", "w36 w37"), ("w38 w39", "w40"), ("w42", "w44")]
TOKENS = torch.tensor([[1, 20, 16, 17, 3], [1, 50, 51, 52, 3]])
BRIDGES = ["bridge:gpt2", "bridge:llama", "bridge:gemma2"]


@cache
def update_of(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> WeightUpdate:
    return finetune(shared(name, dtype), DEMOS, lr=0.3, progress=False, **settings)


def logits(model: Any, *updates: WeightUpdate) -> Tensor:
    with torch.no_grad():
        if not updates:
            return model(TOKENS).clone()
        with intervene(model, *updates):
            return model(TOKENS).clone()


# ---- nothing, halves, wholes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BRIDGES)
def test_zero_times_an_update_is_the_base_bit_for_bit(name: str) -> None:
    model = shared(name)
    update = update_of(name)
    assert (logits(model, update) - logits(model)).abs().max() > 1e-3
    assert torch.equal(logits(model, 0.0 * update), logits(model))
    assert (0.0 * update).norm() == 0


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan"), float("inf"), -float("inf")])
def test_learning_rates_that_are_no_learning_rates_are_refused_before_any_run(lr: float) -> None:
    model = build("bridge:gpt2")
    wrap(model)
    runs: list[int] = []
    handle = model.original_model.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        with pytest.raises(MetaoptLensError, match=r"lr must be a positive, finite number, got"):
            finetune(model, DEMOS, lr=lr)
    finally:
        handle.remove()
    assert not runs
    assert torch.equal(logits(model), logits(shared("bridge:gpt2")))  # lr = 0 would change nothing, and nothing changed


@pytest.mark.parametrize("name", BRIDGES)
def test_two_halves_are_the_whole(name: str) -> None:
    model, update = shared(name, F64), update_of(name, F64, projections=("q", "k", "v", "o"))
    half = 0.5 * update
    whole = logits(model, update)
    assert (whole - logits(model)).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, half, half), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model, half + half), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model, 2.0 * update - update), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(model, update, -update), logits(model), rtol=0, atol=1e-12)
    for name_, tensor in (half + half).tensors().items():
        torch.testing.assert_close(tensor, update.tensors()[name_], rtol=1e-12, atol=0)


def test_updates_of_different_projections_add_to_their_union() -> None:
    model = shared("bridge:gpt2", F64)
    keys, values = (update_of("bridge:gpt2", F64, projections=(p,)) for p in "kv")
    both = keys + values
    assert set(both.tensors()) == {"w_k", "b_k", "w_v", "b_v"}
    torch.testing.assert_close(logits(model, both), logits(model, keys, values), rtol=0, atol=1e-12)
    assert both.settings is None
    assert both.norm() == pytest.approx((keys.norm() ** 2 + values.norm() ** 2) ** 0.5)


@pytest.mark.parametrize("name", BRIDGES)
def test_applied_and_intervene_are_the_same_and_leave_nothing(name: str) -> None:
    model, update = build(name), update_of(name)
    with left_as_it_was(model), update.applied(model) as given, torch.no_grad():
        assert given is model
        inside = model(TOKENS).clone()
    assert torch.equal(inside, logits(model, update))


# ---- interruption -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BRIDGES)
@pytest.mark.parametrize(
    "settings", [{}, {"layer_causal": True}, {"keep_factors": True, "projections": ("q", "o", "v")}]
)
def test_an_interrupted_call_leaves_hooks_and_weights_bit_identical(name: str, settings: dict[str, Any]) -> None:
    model = build(name)
    wrap(model)  # its check runs the model too
    calls: list[int] = []
    armed: list[bool] = []

    def interrupt(tensor: Tensor, hook: Any) -> None:
        calls.append(1)
        if armed and len(calls) == 3:  # in the third step
            raise KeyboardInterrupt

    model.add_hook("blocks.1.attn.hook_z", interrupt)
    with left_as_it_was(model):
        armed.append(True)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            finetune(model, DEMOS, lr=0.3, progress=False, **settings)
        assert len(calls) == 3
        armed.clear()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_under_an_update_leaves_nothing(error: type[BaseException]) -> None:
    model, update = build("bridge:llama"), update_of("bridge:llama")

    def explode(tensor: Tensor, hook: Any) -> None:
        raise error

    with left_as_it_was(model), pytest.raises(error), update.applied(model), torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.attn.hook_z", explode)])


def test_a_diverging_loss_names_step_and_rate_and_applies_nothing() -> None:
    model = build("bridge:gpt_neox")
    wrap(model)
    pattern = r"the loss became (nan|inf) at step \d of 4 \(lr 1e\+20\): try a smaller learning rate"
    with left_as_it_was(model), pytest.raises(MetaoptLensError, match=pattern):
        finetune(model, DEMOS, lr=1e20, progress=False)


def test_an_update_that_overflows_in_the_last_step_is_refused_too() -> None:
    with pytest.raises(MetaoptLensError, match=r"update became NaN or infinite by step 0 of 1.*smaller learning rate"):
        finetune(shared("bridge:gpt2"), DEMOS[:1], lr=1e38, optimizer=torch.optim.RMSprop, progress=False)


# ---- factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BRIDGES, "bridge:qwen2", "bridge:bloom", "bridge:gpt_neox"])
@pytest.mark.parametrize("settings", [{}, {"batch_size": 3}, {"layer_causal": True}])
def test_factors_rebuild_the_update(name: str, settings: dict[str, Any]) -> None:
    update = update_of(name, F64, keep_factors=True, projections=("q", "k", "v"), **settings)
    assert update.factors is not None
    for p in "qkv":
        weight, bias = getattr(update, f"w_{p}"), getattr(update, f"b_{p}")
        rebuilt, shift = torch.zeros_like(weight), torch.zeros_like(weight[:, :, 0])
        for step in update.factors:
            x, e = step.x, getattr(step, f"e_{p}")
            for layer in range(len(x)):
                for row in range(x.shape[1]):
                    for i in range(x.shape[2]):
                        rebuilt[layer] -= 0.3 * torch.einsum("m,hd->hmd", x[layer, row, i], e[layer, row, i])
                        shift[layer] -= 0.3 * e[layer, row, i]
        torch.testing.assert_close(rebuilt, weight, rtol=0, atol=1e-13 * float(weight.abs().max()) + 1e-15)
        if bias is not None:
            torch.testing.assert_close(shift, bias, rtol=0, atol=1e-14)
            assert p == "k" or bias.abs().max() > 1e-4


@pytest.mark.parametrize("name", BRIDGES)
def test_factors_hold_inputs_and_queries_of_their_own_step_and_nothing_at_padding(name: str) -> None:
    update = update_of(name, F64, keep_factors=True, projections=("k", "v"), batch_size=2)
    first = update_of(name, F64, batch_size=2)
    half = finetune(shared(name, F64), DEMOS[:2], lr=0.3, batch_size=2, progress=False)
    assert update.factors is not None
    torch.testing.assert_close(update.w_k, first.w_k, rtol=0, atol=0)  # keeping factors changes nothing
    step = update.factors[1]  # the third and fourth demonstration, under the weights after the first two
    assert step.n_tokens == (5, 4)
    assert step.e_q is None
    for errors in (step.e_k, step.e_v):
        assert errors is not None
        assert not errors[:, 1, 4:].any()
        assert errors[:, 1, :3].abs().max() > 0
    with half.applied(shared(name, F64)):
        queries = host_values(shared(name, F64), [1, 38, 39, 3, 40], "attn.hook_q")
        inputs = host_values(shared(name, F64), [1, 38, 39, 3, 40], "attn.hook_in")
    n_heads = update.model.n_heads
    for layer, (q, x) in enumerate(zip(queries, inputs, strict=True)):
        torch.testing.assert_close(step.q[layer, 0], q.reshape(5, n_heads, -1), rtol=0, atol=1e-6)
        torch.testing.assert_close(step.x[layer, 0], x, rtol=0, atol=1e-6)


def test_without_asking_there_are_no_factors() -> None:
    assert update_of("bridge:gpt2").factors is None
    kept = update_of("bridge:gpt2", keep_factors=True)
    assert kept.factors is not None
    assert (2.0 * kept).factors is None  # they are those of the whole update


# ---- heads --------------------------------------------------------------------------------------------------------


def test_selected_heads_keep_their_update_and_the_others_lose_it() -> None:
    update = update_of("bridge:gpt2", F64, projections=("q", "k", "v", "o"))
    chosen = update.select(["L0H1", HeadRef(2, 3)])
    for name, tensor in chosen.tensors().items():
        original = update.tensors()[name]
        if name == "b_o":
            assert not tensor.any()
            continue
        for layer in range(3):
            for head in range(4):
                kept = (layer, head) in {(0, 1), (2, 3)}
                assert torch.equal(tensor[layer, head], original[layer, head] if kept else 0 * original[layer, head])
    everything = [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    rest = update.select([h for h in everything if h not in {"L0H1", "L2H3"}])
    summed = (chosen + rest).tensors()
    for name, tensor in update.tensors().items():
        if name != "b_o":
            assert torch.equal(summed[name], tensor)


def test_heads_that_share_keys_and_values_are_selected_together() -> None:
    update = update_of("bridge:llama", F64)
    both = update.select(["L1H2", "L1H3"])
    assert torch.equal(both.w_k[1, 1], update.w_k[1, 1])  # type: ignore[index]
    assert both.layer_norms().nonzero().flatten().tolist() == [1]
    with pytest.raises(
        MetaoptLensError, match=r"shares each key-value head among 2 heads: select all heads of a group"
    ):
        update.select(["L1H2"])
    queries = update_of("bridge:llama", F64, projections=("q", "o"))
    assert queries.select(["L1H2"]).w_q is not None  # queries are each head's own


@pytest.mark.parametrize(
    ("heads", "message"),
    [([], "select needs at least one head"), (["L9H0"], "there is no head L9H0"), (["head 3"], "cannot read 'head 3'")],
)
def test_heads_that_do_not_exist(heads: list[str], message: str) -> None:
    with pytest.raises(MetaoptLensError, match=message):
        update_of("bridge:gpt2").select(heads)


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"order": (3, 1, 0, 2), "optimizer_options": {"momentum": 0.5}}])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    update = finetune(shared("bridge:qwen2"), DEMOS, lr=0.3, progress=False, **settings)
    loaded = WeightUpdate.load(update.save(tmp_path / "update"))
    assert loaded.tensors().keys() == update.tensors().keys()
    assert all(torch.equal(t, update.tensors()[name]) for name, t in loaded.tensors().items())
    assert loaded.losses == update.losses
    assert loaded.provenance == update.provenance == (0.5 * update).provenance
    assert loaded.settings == update.settings
    assert loaded.model == update.model
    assert repr(loaded) == repr(update)
    model = shared("bridge:qwen2")
    assert torch.equal(logits(model, loaded), logits(model, update))
    total = update + update
    assert WeightUpdate.load(total.save(tmp_path / "sum")).settings is None


def test_factors_stay_out_of_files(tmp_path: Path) -> None:
    update = finetune(shared("bridge:gpt2"), DEMOS, lr=0.3, keep_factors=True, progress=False)
    assert update.factors is not None
    path = update.save(tmp_path / "update")
    assert load_file(path.with_suffix(".safetensors")).keys() == update.tensors().keys()
    assert WeightUpdate.load(path).factors is None


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = update_of("bridge:gpt2").save(tmp_path / "update")
    with pytest.raises(MetaoptLensError, match="does not exist: a saved weight update is"):
        WeightUpdate.load(tmp_path / "nothing")
    body = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in body.items() if k != "losses"}))
    with pytest.raises(MetaoptLensError, match="is not a complete weight update"):
        WeightUpdate.load(path)
    path.write_text(json.dumps(body | {"settings": body["settings"] | {"lr": -1}}))
    with pytest.raises(MetaoptLensError, match="is not a complete weight update"):
        WeightUpdate.load(path)
    tensors = path.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(MetaoptLensError, match="is damaged or belongs to another save"):
        WeightUpdate.load(path)


def test_table_and_text() -> None:
    update = update_of("bridge:gpt2", projections=("k", "v", "o"))
    frame = update.to_frame()
    assert len(frame) == 3 * 3 * 4
    row = frame[(frame["layer"] == 1) & (frame["head"] == 2) & (frame["projection"] == "v")].iloc[0]
    assert row.weight_norm == pytest.approx(float(update.w_v[1, 2].norm()))  # type: ignore[index]
    assert row.bias_norm == pytest.approx(float(update.b_v[1, 2].norm()))  # type: ignore[index]
    assert "SGD lr 0.3, 4 steps, loss" in repr(update)
    assert repr(update_of("bridge:gpt2", layer_causal=True)).count("layer-causal") == 1
    whole = sum(float(t.double().square().sum()) for t in update.tensors().values()) ** 0.5
    assert update.norm() == pytest.approx(whole)
    assert float(update.layer_norms().square().sum()) ** 0.5 == pytest.approx(whole)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_an_update_of_another_models_shape_is_refused() -> None:
    update, other = update_of("bridge:gpt2"), shared("bridge:llama")
    for use in (lambda: update.hooks(wrap(other)), lambda: update.applied(other).__enter__()):
        with pytest.raises(MetaoptLensError, match=r"this weight update was made with .* \(n_kv_heads = 4\)"):
            use()  # type: ignore[no-untyped-call]
    with pytest.raises(MetaoptLensError, match="cannot add updates of"):
        update + update_of("bridge:llama")


def test_composing_updates_of_two_models_is_refused_before_anything_is_attached() -> None:
    model = build("bridge:gpt2")
    both = intervene(model, update_of("bridge:gpt2"), update_of("bridge:llama"))
    with left_as_it_was(model), pytest.raises(MetaoptLensError, match="was made with"), both:
        pass


def _folded() -> Any:
    model = build("hooked:learned")
    model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    return model


@requires_hooked
def test_processed_weights_are_refused_unless_asked_for() -> None:
    model = _folded()
    with pytest.warns(ProcessedWeightsWarning):
        wrap(model)
    pattern = (
        r"has folded norms.*which changes what finetuning does.*from_pretrained_no_processing.*allow_processed=True"
    )
    with pytest.raises(MetaoptLensError, match=pattern):
        finetune(model, DEMOS, lr=0.1, progress=False)
    update = finetune(model, DEMOS, lr=0.1, allow_processed=True, progress=False)
    assert update.model.processing
    with pytest.raises(MetaoptLensError, match="processing = "):
        update.hooks(wrap(shared("hooked:learned")))  # dW belongs to its parametrisation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"projections": ()}, "projections must be one or several different ones"),
        ({"projections": ("k", "k")}, "projections must be one or several different ones"),
        ({"batch_size": 0}, "batch_size must be at least 1, or None for full-batch, got 0"),
        ({"order": (0, 1, 1, 2)}, "order must be a permutation of 0 to 3"),
        ({"order": (0, 1)}, "order must be a permutation of 0 to 3"),
        ({"optimizer_options": {"weight_decay": 0.1}}, "SGD has weight decay, which would pull the change"),
        ({"optimizer": torch.optim.AdamW}, "AdamW has weight decay, which would pull the change"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MetaoptLensError, match=message):
        finetune(shared("bridge:gpt2"), DEMOS, lr=0.1, progress=False, **settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("projections", ("k", "w"), "projections must be one or several different ones"),
        ("loss", "some", "loss must be 'all' or 'label', got 'some'"),
        ("readout", "mlp", "readout must be 'block' or 'attention', got 'mlp'"),
        ("order", "random", "order must be 'given', 'reversed', 'shuffled' or a permutation"),
    ],
)
def test_words_that_are_no_settings(field: str, value: Any, message: str) -> None:
    """Type checks of the tests would stop these in the constructor; users have no such checks."""
    settings = FinetuneSettings(lr=0.1)
    object.__setattr__(settings, field, value)
    with pytest.raises(MetaoptLensError, match=message):
        settings.__post_init__()


@pytest.mark.parametrize(
    ("demos", "message"),
    [
        ([], "at least one demonstration"),
        ("w30 : w31", "no demonstration: it is the single block"),
        ([(" ", "w3")], "the input of demonstration 0 is empty"),
        ([("w30 " * 70, "w31")], r"demonstration 0 has 73 tokens, but the context window of .* is 64"),
        (["w30 " * 70], r"text 0 has 71 tokens, but the context window of .* is 64"),
    ],
)
def test_demonstrations_that_cannot_be_learned(demos: Any, message: str) -> None:
    with pytest.raises(MetaoptLensError, match=message):
        finetune(shared("bridge:gpt2"), demos, lr=0.1, progress=False)


def test_a_single_token_without_bos_leaves_nothing_to_predict() -> None:
    with pytest.raises(MetaoptLensError, match="text 1 has a single token: there is nothing to predict"):
        finetune(shared("bridge:gpt2"), ["w30 w31", "w32"], lr=0.1, prepend_bos=False, progress=False)


def test_settings_are_stored_as_used() -> None:
    update = update_of("bridge:gpt2", epochs=2, order="reversed", batch_size=None, layer_causal=True)
    assert update.settings == FinetuneSettings(lr=0.3, epochs=2, order="reversed", batch_size=None, layer_causal=True)
    assert dataclasses.asdict(update.settings)["optimizer"] == "SGD"
    assert len(update.losses) == 2


def test_progress_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    finetune(shared("bridge:gpt2"), DEMOS, lr=0.1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_demonstrations_of_a_prompt_or_the_pairs_themselves() -> None:
    prompt = ICLPrompt(DEMOS, "w16")
    first = finetune(shared("bridge:gpt2"), prompt, lr=0.3, progress=False)
    assert torch.equal(first.w_v, update_of("bridge:gpt2").w_v)  # type: ignore[arg-type]
