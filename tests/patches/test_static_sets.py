"""Static patches and finetuning behind several demonstration sets: t intervals over the sets, and all nulls."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from hosts import build, prompt, requires_hooked
from scipy import stats

from metaopt_lens import ICLPrompt, finetune, load_tiny
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis import (
    PatchesAgainstFinetuning,
    StaticCurve,
    StaticCurves,
    change_cosines,
    patch_against_finetuning,
    patches_against_finetuning,
    static_curve,
)
from metaopt_lens.experiments import compile_prompts, episode_prompts
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.models.tiny import sample_episode
from metaopt_lens.patches import exact_patches

N_SETS = 3


@cache
def queries(seed: int) -> tuple[ICLPrompt, ...]:
    """Eight queries behind the same demonstrations, with their labels."""
    found: dict[str, ICLPrompt] = {}
    for asked in episode_prompts(sample_episode(random.Random(seed), n_demos=8, n_categories=2)):
        found.setdefault(asked.query, asked)
    return tuple(found.values())[:8]


@cache
def curves() -> tuple[Any, tuple[StaticCurve, ...]]:
    model = load_tiny()
    return model, tuple(static_curve(model, queries(s)[::2], queries(s)[1::2]) for s in range(N_SETS))


@cache
def compared() -> PatchesAgainstFinetuning:
    model, found = curves()
    return patches_against_finetuning(model, found, seeds=(7, 8))


def t_interval(values: list[float]) -> tuple[float, float]:
    """By scipy, from one value for each set."""
    ends: tuple[float, float] = stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values)
    )
    return ends


def test_intervals_of_the_curve_are_over_the_sets() -> None:
    _, found = curves()
    frame = StaticCurves(found).to_frame().set_index("setting")
    for name, number in (("in context", 0), ("static patch, 4 queries", 3)):
        gains = [float((c.correct[number].double() - c.correct[1].double()).mean()) for c in found]
        row = frame.loc[name]
        assert row["gain"] == pytest.approx(sum(gains) / N_SETS)
        if len(set(gains)) > 1:
            low, high = t_interval(gains)
            assert (row["gain_low"], row["gain_high"]) == pytest.approx((max(low, -1.0), min(high, 1.0)))
    kl = [float(c.kl_to_in_context[2].mean()) for c in found]
    low, high = t_interval(kl)
    row = frame.loc["static patch, 4 queries"]
    assert (row["kl_to_in_context_low"], row["kl_to_in_context_high"]) == pytest.approx((max(low, 0.0), high))
    assert row["sets"] == N_SETS
    assert (
        "zero-shot: accuracy" in StaticCurves(found).sentence or "changes the accuracy" in StaticCurves(found).sentence
    )


def test_intervals_of_cosines_and_excesses_are_over_the_sets() -> None:
    found = compared()
    frame = found.to_frame()
    assert set(frame["update"]) == {"finetuned", "shuffled labels", "uphill", "unrelated text", "other demonstrations"}
    cosines = [one.cosine for one in found.sets]
    for name in ("shuffled labels", "uphill", "unrelated text", "other demonstrations"):
        null = [one.nulls[name].mean(0) for one in found.sets]
        for chosen, matrix in ((slice(1, 2), "in"), (slice(None), "all")):
            excess = [float((a - b)[:, chosen].mean()) for a, b in zip(cosines, null, strict=True)]
            row = frame[(frame["update"] == name) & (frame["matrix"] == matrix)].iloc[0]
            assert row["excess"] == pytest.approx(sum(excess) / N_SETS, abs=1e-9)
            assert (row["excess_low"], row["excess_high"]) == pytest.approx(t_interval(excess), abs=1e-9)
    row = frame[(frame["update"] == "finetuned") & (frame["matrix"] == "all")].iloc[0]
    whole = [float(cosine.mean()) for cosine in cosines]
    assert (row["cosine_low"], row["cosine_high"]) == pytest.approx(t_interval(whole), abs=1e-9)
    assert f"over {N_SETS} demonstration sets" in found.sentence
    frame = found.accuracy_frame()
    assert {"in context", "zero-shot", "static patch", "finetuned", "finetuned, other demonstrations"} <= {
        *frame["setting"]
    }
    assert (frame["sets"] == N_SETS).all()
    assert (frame["n"] == sum(len(c.asked) for c in curves()[1])).all()


def test_other_demonstrations_are_the_next_sets() -> None:
    """Finetuned here again, apart, at the same rate."""
    model, found = curves()
    settings = compared().sets[0].finetuned.settings
    assert settings is not None
    for number, one in enumerate(compared().sets):
        again = finetune(
            model,
            queries((number + 1) % N_SETS)[0],
            lr=settings.lr,
            projections=settings.projections,
            bias=False,
            progress=False,
        )
        expected = change_cosines(found[number].patch, again)
        torch.testing.assert_close(one.nulls["other demonstrations"][0], expected, rtol=0, atol=1e-6)
        assert not torch.allclose(expected, one.cosine, rtol=0, atol=1e-3)


def test_a_single_set_has_no_interval() -> None:
    model, found = curves()
    one = patches_against_finetuning(model, found[:1], seeds=(7,))
    frame = one.to_frame()
    assert frame["cosine"].notna().all()
    assert frame["cosine_low"].isna().all()
    assert "A single demonstration set says nothing" in one.sentence
    assert any(
        "'other demonstrations' is left out (it needs a second demonstration set)" in n for n in one.sets[0].notes
    )


def test_all_sets_of_a_prompt_file_are_used() -> None:
    model, found = curves()
    # One set more, with too few queries.
    prompts = [*queries(0), *queries(1), *queries(9)[:3]]
    compiled = compile_prompts(model, prompts)
    assert compiled.static is not None
    assert len(compiled.static.sets) == 2
    for own, expected in zip(compiled.static.sets, found, strict=False):
        assert torch.equal(own.correct, expected.correct)
    assert sum("got 3" in note for note in compiled.notes) == 1


def test_bad_input() -> None:
    model, found = curves()
    with pytest.raises(OptionError, match="give a static curve for each demonstration set"):
        patches_against_finetuning(model, [])
    one_matrix = finetune(model, queries(1)[0], lr=0.05, projections=("mlp_in",), bias=False, progress=False)
    whole = finetune(
        model, queries(0)[0], lr=0.05, projections=("mlp_in", "mlp_gate", "mlp_out"), bias=False, progress=False
    )
    with pytest.raises(OptionError, match=r"must change gate and in and out.*this one changes in: make it with"):
        patch_against_finetuning(model, found[0], whole, others=[one_matrix])
    other = static_curve(model, queries(0)[::2], queries(0)[1::2], ridge=0.5)
    with pytest.raises(OptionError, match="all have the same n_fit and ridge"):
        StaticCurves((found[0], other))
    with pytest.raises(OptionError, match="all have the same n_fit and ridge"):
        StaticCurves(())
    with pytest.raises(PromptError, match="the patches are not those of the fitting queries"):
        static_curve(model, queries(0)[::2], queries(0)[1::2], patches=exact_patches(model, queries(0)[1:5]))


def test_patches_made_before_give_the_same_curve() -> None:
    model, found = curves()
    again = static_curve(model, queries(0)[::2], queries(0)[1::2], patches=exact_patches(model, queries(0)[::2]))
    assert torch.equal(again.static, found[0].static)


@requires_hooked
def test_attention_only_models_compare_the_output_projection() -> None:
    model = build("hooked:attn_only")
    asked = [
        ICLPrompt(prompt(4).demos, f"w{6 + i}", label=label, candidates=("w32", "w40"))
        for i, label in enumerate(["w32", "w40", "w32", "w40"])
    ]
    curve = static_curve(model, asked[:2], asked[2:])
    update = finetune(model, asked[0], lr=0.05, projections=("o",), bias=False, progress=False)
    found = patch_against_finetuning(model, curve, update, seeds=(1,))
    assert found.matrices == ("o",)
    assert list(found.nulls) == ["shuffled labels", "uphill", "unrelated text"]
    assert isinstance(update, WeightUpdate)
    assert update.w_o is not None
    for layer in range(3):
        patch = curve.patch.dense(layer, "o").AB.double()  # d_model (head d_head)
        # head by head, entry by entry
        heads = patch.mT.unflatten(0, (4, 8))
        inner = (heads * update.w_o[layer].double()).sum()
        expected = inner / patch.norm() / update.w_o[layer].double().norm()
        torch.testing.assert_close(found.cosine[layer, 0], expected, rtol=0, atol=1e-6)
    with pytest.raises(OptionError, match=r"no matrix of the MLP, and not W_O.*projections=\('o',\)"):
        patch_against_finetuning(model, curve, finetune(model, asked[0], lr=0.05, progress=False))
