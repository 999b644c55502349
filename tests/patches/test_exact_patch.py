"""The exact patch: zero-shot plus weight changes is the in-context run, at every token of the query."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hosts import HOST_NAMES, build, left_as_it_was, prompt, shared
from torch import Tensor

from metaopt_lens import WeightPatch, compile_context, finetune, intervene, meta_gradient
from metaopt_lens.interventions import KnockOut

MIXTURES = {"bridge:mixtral", "bridge:gpt_oss"}
# Softmax or norms in float32 whatever the dtype, so that two equal passes differ by float32's rounding.
FLOAT32_INSIDE = {"bridge:gptj", "bridge:gpt_oss", "bridge:gpt_neo", "bridge:mpt"}
CHANGED = {
    "bridge:gpt2": ("in", "out"),
    "bridge:llama": ("gate", "in", "out"),
    "bridge:gemma3": ("gate", "in"),
    "bridge:olmo2": ("gate", "in"),
    "bridge:phi": ("out",),
    "bridge:mixtral": ("router", "expert_out"),
}
PROMPT = prompt(6, query="w18 w19 :")  # in every family the demonstrations move a logit by more than 1


def precise(name: str) -> Any:
    """A float64 model; transformers' default kernel for experts has none."""
    model = build(name, dtype=torch.float64)
    if name in MIXTURES:
        model.original_model.config._experts_implementation = "eager"
    return model


@cache
def compiled(name: str) -> tuple[Any, WeightPatch]:
    model = precise(name)
    return model, compile_context(model, PROMPT)


def logits(model: Any, ids: Any, n: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([list(ids)]))[0, -n:]
    return found


def three_runs(model: Any, patch: WeightPatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at every token of the query: patched, in context, and zero-shot without the patch."""
    n = len(patch.query_ids)
    in_context, zero_shot = (logits(model, ids, n) for ids in (patch.tokens.ids, patch.zero_shot_ids))
    with intervene(model, patch):
        patched = logits(model, patch.zero_shot_ids, n)
    return patched, in_context, zero_shot


@pytest.mark.parametrize("name", HOST_NAMES)
def test_patched_zero_shot_is_the_in_context_run_in_float64(name: str) -> None:
    model, patch = compiled(name)
    patched, in_context, zero_shot = three_runs(model, patch)
    assert len(patched) == 3  # the whole query, not its last token alone
    torch.testing.assert_close(patched, in_context, rtol=0, atol=1e-5 if name in FLOAT32_INSIDE else 1e-9)
    assert (zero_shot - in_context).abs().max() > 1  # without the patch
    assert patch.next_token == int(in_context[-1].argmax())
    assert patch.matrices == CHANGED.get(name, patch.matrices)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_and_in_float32(name: str) -> None:
    model = shared(name)
    patch = compile_context(model, PROMPT)
    assert patch.precision == "float32"
    patched, in_context, zero_shot = three_runs(model, patch)
    torch.testing.assert_close(patched, in_context, rtol=0, atol=1e-4 * float(in_context.abs().max()))
    assert (zero_shot - in_context).abs().max() > 1  # without the patch


@pytest.mark.parametrize("name", HOST_NAMES)
def test_each_change_has_rank_one(name: str) -> None:
    _, patch = compiled(name)
    for matrix in patch.matrices:
        for position in range(3):
            dense = patch.dense(1, position, matrix).AB
            values = torch.linalg.svdvals(dense)
            assert values[0] > 0
            assert values[1] <= 1e-10 * values[0]
            torch.testing.assert_close(values[0], patch.norms(matrix)[1, position], rtol=1e-10, atol=0)


def test_several_experts_are_active() -> None:
    model = build("bridge:mixtral", dtype=torch.float64, num_local_experts=4, num_experts_per_tok=2)
    model.original_model.config._experts_implementation = "eager"
    patch = compile_context(model, PROMPT)
    patched, in_context, _ = three_runs(model, patch)
    torch.testing.assert_close(patched, in_context, rtol=0, atol=1e-9)
    assert patch.experts is not None
    assert patch.experts.active.shape == (3, 3, 2)


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gemma2", "bridge:opt", "bridge:bloom", "native:learned"])
def test_the_patch_is_for_any_pass_of_the_prompt(name: str) -> None:
    """Several sequences, padding, and a pass in two parts behind the host's own cache."""
    model, patch = compiled(name)
    in_context = logits(model, patch.tokens.ids, 3)
    ids = torch.tensor([list(patch.zero_shot_ids)])
    with intervene(model, patch), torch.no_grad():
        several = model(ids.expand(3, -1))
        shorter = model(ids[:, :-1])
    torch.testing.assert_close(several[:, -3:], in_context.expand(3, -1, -1), rtol=0, atol=1e-9)
    torch.testing.assert_close(shorter[0, -2:], in_context[:2], rtol=0, atol=1e-9)
    if name.startswith("native"):
        return  # it has neither masks nor a cache
    from transformers import DynamicCache

    mask = torch.tensor([[1] * ids.shape[1] + [0, 0]])
    cached = DynamicCache()
    with intervene(model, patch), torch.no_grad():
        padded = model(torch.nn.functional.pad(ids, (0, 2)), attention_mask=mask)
        model(ids[:, :-1], past_key_values=cached, use_cache=True)
        last = model(ids[:, -1:], past_key_values=cached, use_cache=True)
    torch.testing.assert_close(padded[0, -5:-2], in_context, rtol=0, atol=1e-9)
    torch.testing.assert_close(last[0, -1], in_context[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gemma3", "bridge:phi", "bridge:mixtral"])
def test_nothing_is_left_behind(name: str) -> None:
    model = build(name)
    with left_as_it_was(model):
        patch = compile_context(model, PROMPT)
        with intervene(model, patch):
            logits(model, patch.zero_shot_ids, 1)


def test_with_a_weight_update_on_it_is_the_updated_models_patch() -> None:
    model = precise("bridge:llama")
    update = finetune(model, prompt(3, first=50), lr=0.05)
    with intervene(model, update):
        patch = compile_context(model, PROMPT)
        in_context = logits(model, patch.tokens.ids, 3)
    plain = logits(model, patch.tokens.ids, 3)
    for order in ((update, patch), (patch, update)):
        with intervene(model, *order):
            found = logits(model, patch.zero_shot_ids, 3)
        torch.testing.assert_close(found, in_context, rtol=0, atol=1e-9)
    assert (plain - in_context).abs().max() > 1e-3


def test_with_a_users_own_hook_on_it_is_that_models_patch() -> None:
    model = precise("bridge:llama")

    def halve(tensor: Tensor, hook: Any) -> Tensor:
        return 0.5 * tensor

    plain = logits(model, compiled("bridge:llama")[1].tokens.ids, 3)
    model.add_hook("blocks.1.hook_mlp_out", halve)
    patched, in_context, _ = three_runs(model, compile_context(model, PROMPT))
    torch.testing.assert_close(patched, in_context, rtol=0, atol=1e-9)
    assert (in_context - plain).abs().max() > 1e-3


def test_beside_a_meta_gradient_both_act() -> None:
    """The meta-gradient gives the MLP its in-context input z_C, on which the patch's dW acts once more."""
    model, patch = compiled("bridge:llama")
    at, seen = "blocks.0.mlp.in", {}

    def keep(tensor: Tensor, hook: Any) -> None:
        seen[hook.name] = tensor[0, -3:]

    reads = [(f"{at}.hook_in", keep), (f"{at}.hook_out", keep)]
    with intervene(model, meta_gradient(model, PROMPT), patch), torch.no_grad():
        model.run_with_hooks(torch.tensor([list(patch.zero_shot_ids)]), fwd_hooks=reads)
    z_in_context, product = seen[f"{at}.hook_in"], seen[f"{at}.hook_out"]
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([list(patch.tokens.ids)]), fwd_hooks=reads[:1])
    torch.testing.assert_close(z_in_context, seen[f"{at}.hook_in"], rtol=0, atol=1e-5)  # its norms are in float32
    weight = model.original_model.model.layers[0].mlp.up_proj.weight.detach()
    expected = torch.stack([(weight + patch.dense(0, i, "in").AB) @ z for i, z in enumerate(z_in_context)])
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-9)
    assert (product - z_in_context @ weight.mT).abs().max() > 0.1


def test_numbers_of_the_changes() -> None:
    model, patch = compiled("bridge:llama")
    frame = patch.to_frame()
    assert len(frame) == 3 * 3 * 3
    assert frame["share"].groupby([frame["layer"], frame["position"]]).sum().to_numpy() == pytest.approx(1.0)
    row = frame[(frame["layer"] == 2) & (frame["position"] == patch.positions[1]) & (frame["matrix"] == "gate")].iloc[0]
    weight = model.original_model.model.layers[2].mlp.gate_proj.weight.detach()
    assert row["norm"] == pytest.approx(float(patch.dense(2, 1, "gate").AB.norm()), rel=1e-10)
    assert row["relative"] == pytest.approx(row["norm"] / float(weight.norm()), rel=1e-6)
    assert "4 demonstrations" not in repr(patch)
    assert "6 demonstrations as rank-one changes of gate and in and out in 3 layers, for 3 tokens" in repr(patch)


def test_numbers_of_experts() -> None:
    _, patch = compiled("bridge:mixtral")
    assert patch.experts is not None
    frame = patch.to_frame()
    assert list(frame["matrix"][:3]) == ["router", "expert_out", "experts_in"]
    change = torch.outer(patch.experts.left_in[0, 0, 0], patch.right["in"][0, 0])  # one expert is active
    assert frame["norm"][2] == pytest.approx(float(change.norm()), rel=1e-10)
    assert frame["relative"].isna().tolist() == [False, True, True] * 9


def test_the_smallest_coordinate_is_reported() -> None:
    _, patch = compiled("bridge:gemma3")
    assert patch.scale is not None
    assert patch.smallest is not None
    normalized = patch.u / patch.scale
    torch.testing.assert_close(normalized.abs().amin(-1), patch.smallest, rtol=1e-9, atol=0)
    assert set(patch.to_frame()["matrix"]) == {"gate", "in", "scale"}
    assert compiled("bridge:llama")[1].smallest is None


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gemma3", "bridge:mixtral"])
def test_saved_and_read_again_it_is_the_same(name: str, tmp_path: Any) -> None:
    model, patch = compiled(name)
    again = WeightPatch.load(patch.save(tmp_path / "patch"))
    assert repr(again) == repr(patch)
    with intervene(model, again):
        found = logits(model, again.zero_shot_ids, 3)
    with intervene(model, patch):
        assert torch.equal(found, logits(model, patch.zero_shot_ids, 3))


def test_a_knock_out_that_is_on_is_refused() -> None:
    model = shared("bridge:llama")
    with (
        intervene(model, KnockOut(PROMPT)),
        pytest.raises(ValueError, match=r"a knock-out is applied to .* Call compile_context outside the block"),
    ):
        compile_context(model, PROMPT)
