"""The best possible update: held-out regression against a slow one, planted updates, noise, and real models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hosts import prompt as host_prompt
from hosts import shared
from torch import Tensor

from metaopt_lens import ICLPrompt, finetune, load_tiny, wrap
from metaopt_lens._errors import OptionError, PromptError, UnsupportedModelError
from metaopt_lens.analysis import Ceiling, ceiling, mean_interval
from metaopt_lens.analysis._ceiling import (
    CEILING,
    CONSTANT,
    FINETUNED,
    FIRST_ORDER,
    LINEAR,
    SCALED,
    attended_inputs,
    value_ceiling,
)
from metaopt_lens.analysis._held_out import RIDGES, held_out_mean, held_out_predictions, held_out_scale, ratio_values
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.runs import record, tokenize_for

NOUNS = [("apple", "dax"), ("hammer", "wug"), ("pear", "dax"), ("saw", "wug"), ("plum", "dax"), ("drill", "wug")]
ASKED = [("cherry", "dax"), ("pliers", "wug"), ("peach", "dax"), ("chisel", "wug"), ("lemon", "dax"), ("axe", "wug")]


def prompts(n_sets: int = 1) -> list[ICLPrompt]:
    sets = (NOUNS[:4], NOUNS[2:])[:n_sets]
    return [ICLPrompt(demos, query, label=label) for query, label in ASKED for demos in sets]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def r_squared(target: Tensor, prediction: Tensor) -> float:
    return float(1 - (target - prediction).square().sum() / target.square().sum())


# ---- held-out regression ---------------------------------------------------------------------------------------------


def slow(x: Tensor, t: Tensor, folds: list[int]) -> Tensor:
    """Two nested loops over folds and the normal equations."""

    def fit_and_predict(fit: list[int], at: list[int], ridge: float) -> Tensor:
        rows, out = x[fit].flatten(0, 1), t[fit].flatten(0, 1)
        penalty = ridge * rows.square().sum(-1).mean()
        weights = torch.linalg.solve(rows.mT @ rows + penalty * torch.eye(rows.shape[1]).double(), rows.mT @ out)
        return x[at] @ weights

    found = torch.zeros_like(t)
    for fold in sorted(set(folds)):
        others = sorted(set(folds) - {fold})
        errors = []
        for ridge in RIDGES:
            error = 0.0
            for judge in others:
                fit = [i for i, f in enumerate(folds) if f not in (fold, judge)]
                at = [i for i, f in enumerate(folds) if f == judge]
                error += float((fit_and_predict(fit, at, ridge) - t[at]).square().sum())
            errors.append(error)
        fit, at = [i for i, f in enumerate(folds) if f != fold], [i for i, f in enumerate(folds) if f == fold]
        found[at] = fit_and_predict(fit, at, RIDGES[errors.index(min(errors))])
    return found


def test_held_out_predictions_are_those_of_a_slow_loop() -> None:
    """Of several maps at once, each with its own lambda; two rows a unit; folds of unequal size."""
    folds = [0, 1, 2, 0, 1, 2, 3, 3, 0, 1, 2]
    x = normal(2, 11, 2, 3, seed=0)
    t = x @ normal(2, 1, 3, 4, seed=1) + torch.tensor([0.1, 3.0]).double()[:, None, None, None] * normal(
        2, 11, 2, 4, seed=2
    )
    found = held_out_predictions(x, t, torch.tensor(folds))
    for number in range(2):
        torch.testing.assert_close(found[number], slow(x[number], t[number], folds), rtol=1e-6, atol=1e-8)


def test_a_left_out_query_has_no_say_in_its_prediction() -> None:
    x, t, folds = normal(9, 1, 4, seed=0), normal(9, 1, 2, seed=1), torch.arange(9) % 3
    before = held_out_predictions(x, t, folds)
    t[4] += 100.0
    after = held_out_predictions(x, t, folds)
    assert torch.equal(before[folds == folds[4]], after[folds == folds[4]])
    assert not torch.allclose(before[folds != folds[4]], after[folds != folds[4]])


def test_a_planted_map_is_found_and_noise_is_not() -> None:
    folds = torch.arange(60) % 5
    x = normal(60, 1, 20, seed=0)
    t = x @ normal(20, 8, seed=1)
    assert r_squared(t, held_out_predictions(x, t, folds)) == pytest.approx(1, abs=1e-6)
    # Inputs of lower rank than there are queries too, wherever the map is determined.
    few = x[:12] @ normal(20, 3, seed=2) @ normal(3, 20, seed=3)
    t = few @ normal(20, 8, seed=1)
    assert r_squared(t, held_out_predictions(few, t, torch.arange(12) % 5)) == pytest.approx(1, abs=1e-6)
    noise, same = normal(300, 12, 1, 8, seed=4), x[:12].expand(300, 12, 1, 20)
    made = held_out_predictions(same, noise, torch.arange(12) % 5)
    found = 1 - (noise - made).square().sum((1, 2, 3)) / noise.square().sum((1, 2, 3))
    assert float(found.mean()) <= 0
    assert float(found.mean()) > -0.5  # lambda is chosen: it does not interpolate noise


def test_one_scale_and_one_constant() -> None:
    folds = torch.arange(10) % 5
    f = normal(10, 2, 6, seed=0)
    t = 0.3 * f[:, 0] - 2.0 * f[:, 1]
    assert r_squared(t, held_out_scale(f, t, folds)) == pytest.approx(1, abs=1e-9)
    assert r_squared(t, held_out_scale(f[:, :1], t, folds)) < 0.5
    constant = normal(1, 1, 6, seed=1).expand(10, 1, 6)
    torch.testing.assert_close(held_out_mean(constant, folds), constant, rtol=1e-9, atol=1e-9)
    assert held_out_predictions(torch.zeros(10, 1, 3), t[:, None], folds).abs().max() == 0


@pytest.mark.parametrize(
    ("n_sets", "n", "between"), [(1, 24, 0.0), (3, 8, 0.0), (3, 8, 0.3), (5, 8, 0.3), (25, 12, 0.3)]
)
def test_intervals_of_r_squared_cover(n_sets: int, n: int, between: float) -> None:
    """Predictions that leave a known share unexplained, which differs between sets: 95 % intervals hold the truth."""
    n_draws, d = 1000, 16
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sets = torch.arange(n_sets).repeat_interleave(n)
    scale = (between * draw(n_sets, n_draws)).exp()[sets]
    explained_part, rest = draw(n_sets * n, n_draws, d), scale[..., None] * draw(n_sets * n, n_draws, d)
    values = 1 - ratio_values(rest.square().sum(-1), (explained_part + rest).square().sum(-1), sets)
    found = mean_interval(values, sets=sets)
    truth = 0.5  # 1 / (1 + e^2z) is 1/2 on average over a symmetric z
    covered = float(((found.low <= truth) & (truth <= found.high)).double().mean())
    assert 0.93 <= covered <= 0.97


# ---- the ceiling of values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gpt2", "bridge:mistral"])
def test_z_is_linear_in_the_values_change(name: str) -> None:
    """The model itself with another W_V (and b_V) in one layer at a time: z changes by ``xbar dW``, to rounding."""
    model = wrap(shared(name))
    info = model.info
    tokens = [tokenize_for(model, host_prompt(2, query=query)) for query in ("w16 w17 :", "w18 :")]
    generator = torch.Generator().manual_seed(0)
    w_v = 0.1 * torch.randn(info.n_layers, info.n_kv_heads, info.d_model, info.d_head, generator=generator)
    b_v = 0.1 * torch.randn(info.n_layers, info.n_kv_heads, info.d_head, generator=generator)
    has_bias = all(model.has_bias("v", layer) for layer in range(info.n_layers))
    inputs = attended_inputs(model, [r.zs for r in record(model, tokens, settings=("zs",))])
    assert inputs.shape[-1] == info.d_model + has_bias
    for layer in range(info.n_layers):
        only = (torch.arange(info.n_layers) == layer).float()
        update = WeightUpdate(
            info, w_v=w_v * only[:, None, None, None], b_v=b_v * only[:, None, None] if has_bias else None
        )
        runs = record(model, tokens, settings=("zs", "ft"), update=update)
        change = torch.stack([r.ft.z[-1, layer] - r.zs.z[-1, layer] for r in runs])
        weight = torch.cat([w_v[layer], b_v[layer][:, None]], dim=1) if has_bias else w_v[layer]
        heads = weight.repeat_interleave(info.n_heads // info.n_kv_heads, dim=0)  # head d_in d_head
        expected = torch.einsum("qhi,hio->qho", inputs[:, layer], heads)
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-5)


def test_a_planted_value_update_reaches_the_ceiling_and_noise_does_not() -> None:
    n, n_layers, n_heads, n_kv, d_in, d_head = 80, 2, 4, 2, 12, 5
    inputs, zs = normal(n, n_layers, n_heads, d_in, seed=0), normal(n, n_layers, n_heads, d_head, seed=1)
    change = normal(n_layers, n_kv, d_in, d_head, seed=2).repeat_interleave(2, dim=1)
    planted = torch.einsum("qlhi,lhio->qlho", inputs, change)
    other, linear, folds = normal(n, n_layers, n_heads, d_head, seed=3), 7.0 * planted, torch.arange(n) % 5
    found = value_ceiling(zs + planted, zs, zs + other, linear, inputs, folds, n_kv_heads=n_kv)
    sets = torch.zeros(n, dtype=torch.int64)
    per_group = found.r_squared(CEILING, sets).mean(0)
    assert per_group.shape == (n_layers, n_kv)
    assert float((per_group - 1).abs().max()) < 1e-6
    assert float(found.interval(LINEAR, sets).estimate) == pytest.approx(1, abs=1e-6)  # any scale will do
    assert float(found.interval(FINETUNED, sets).estimate) < 0  # unrelated
    assert abs(float(found.interval(SCALED, sets).estimate)) < 0.1
    assert float(found.cosine(CEILING, sets).estimate) == pytest.approx(1, abs=1e-6)
    noise = value_ceiling(zs + other, zs, zs + planted, linear, inputs, folds, n_kv_heads=n_kv)
    assert float(noise.interval(CEILING, sets).estimate) <= 0.01  # one draw; see above for the mean


def test_on_fitted_queries_no_change_of_values_does_better() -> None:
    """At lambda -> 0, where fitted and judged queries are the same: at least finetuning's own change of values."""
    model, asked = wrap(load_tiny()), prompts()
    update = finetune(model, asked[0], lr=0.05)
    tokens = [tokenize_for(model, text) for text in asked]
    runs = record(model, tokens, settings=("icl", "zs", "ft"), update=update)
    inputs = attended_inputs(model, [r.zs for r in runs]).double()
    assert update.w_v is not None
    for layer in range(model.info.n_layers):
        for head in range(model.info.n_heads):
            kv = head * model.info.n_kv_heads // model.info.n_heads
            x = inputs[:, layer, head]
            t = torch.stack([r.icl.z[-1, layer, head] - r.zs.z[-1, layer, head] for r in runs]).double()
            best = x @ (torch.linalg.pinv(x) @ t)
            own = x @ update.w_v[layer, kv].double()
            assert r_squared(t, best) >= r_squared(t, own) - 1e-9


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_every_set_is_fitted_by_itself_and_files_keep_it(tmp_path: Path) -> None:
    """Two sets asked in turn give what each gives alone, whatever the order of the prompts."""
    model, asked = load_tiny(), prompts(2)
    updates = [finetune(model, asked[number], lr=0.02) for number in range(2)]
    both = ceiling(model, asked, updates, n_folds=3)
    alone = ceiling(model, asked[1::2], updates[1], n_folds=3)
    for target in ("value", "output"):
        for name, errors in both[target].errors.items():
            torch.testing.assert_close(errors[1::2], alone[target].errors[name], rtol=1e-4, atol=1e-6)
    assert both.sets.tolist() == [0, 1] * 6
    assert both["value"].sizes.shape == (12, 3, 4)
    assert both["output"].sizes.shape == (12, 3, 1)
    assert both.r_squared().n_sets == 2
    assert alone.r_squared().label == "conditional on these demonstrations"
    assert list(both["value"].errors) == [CONSTANT, FINETUNED, SCALED, LINEAR, FIRST_ORDER, CEILING]
    assert "Ceiling of" in repr(both)
    assert "over 2 demonstration sets" in repr(both)
    table = both.to_frame().set_index(["target", "update"])
    assert table.loc[("value", CEILING), "of_ceiling"] == pytest.approx(1)
    assert len(both.to_frame(by_layer=True)) == 3 * len(table)
    back = Ceiling.load(both.save(tmp_path / "ceiling"))
    assert repr(back) == repr(both)
    assert back.sets.equal(both.sets)
    assert len(both.plot().data) == 2


def test_r_squared_of_a_set_is_the_mean_of_its_queries_values() -> None:
    found = ceiling(load_tiny(), prompts(2), [finetune(load_tiny(), p, lr=0.02) for p in prompts(2)[:2]], n_folds=3)
    item = found["value"]
    values = item.r_squared(FINETUNED, found.sets)
    for number in range(2):
        rows = found.sets == number
        direct = 1 - item.errors[FINETUNED][rows].sum(0) / item.sizes[rows].sum(0)
        torch.testing.assert_close(values[rows].mean(0), direct)
    with pytest.raises(OptionError, match="there is no predictor 'x': choose one of one constant vector"):
        item.r_squared("x", found.sets)


def test_the_mlp_too() -> None:
    """Targets of the exact patches; finetuning of the same matrices stands beside them."""
    model, asked = load_tiny(), prompts()
    update = finetune(model, asked[0], lr=0.02, projections=("k", "v", "mlp_in", "mlp_out"))
    found = ceiling(model, asked, update, targets=["mlp"], n_folds=3)
    assert set(found.targets) == {"mlp gate", "mlp in", "mlp out"}
    assert FIRST_ORDER in found["mlp in"].errors
    assert FIRST_ORDER not in found["mlp gate"].errors
    assert found["mlp out"].sizes.shape == (6, 3, 1)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_too_few_queries_say_how_many_are_needed() -> None:
    match = "cross-validation in 5 folds needs at least 5 queries behind every demonstration set, got 4: give 1 more, "
    with pytest.raises(PromptError, match=match + "or n_folds=4."):
        ceiling(load_tiny(), prompts()[:4])
    with pytest.raises(PromptError, match="got 2: give 3 more, or n_folds=3 and 3 of them"):
        ceiling(load_tiny(), prompts()[:2])


def test_refusals() -> None:
    model, asked = load_tiny(), prompts()
    with pytest.raises(OptionError, match="n_folds must be at least 3, got 2: one fold is left out"):
        ceiling(model, asked, n_folds=2)
    with pytest.raises(OptionError, match=r"targets must be among 'value', 'output', 'mlp', got .'keys'."):
        ceiling(model, asked, targets=["keys"])
    with pytest.raises(OptionError, match="there is no target 'mlp in': choose one of 'value'"):
        _ = ceiling(model, asked, finetune(model, asked[0], lr=0.01), targets=["value"])["mlp in"]


def test_a_mixture_of_experts_has_no_ceiling_of_its_mlp() -> None:
    model = shared("bridge:mixtral")
    asked = [host_prompt(2, query=f"w{i} :", first=40) for i in (16, 17, 18)]
    asked = [dataclasses.replace(text, label=None) for text in asked]
    update = finetune(model, asked[0], lr=0.01)
    with pytest.raises(UnsupportedModelError, match=r"is a mixture of experts: .* Leave 'mlp' out of the targets"):
        ceiling(model, asked, update, targets=["mlp"], n_folds=3)
