"""The static patch compared with finetuning of the same matrices on the same demonstrations."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from typing import Any

import pytest
import torch

from metaopt_lens import ICLPrompt, finetune, load_tiny
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis import (
    PatchAgainstFinetuning,
    StaticCurve,
    change_cosines,
    exact_interval,
    patch_against_finetuning,
    shuffle_labels,
    static_curve,
)
from metaopt_lens.experiments import episode_prompts
from metaopt_lens.finetuning import WeightUpdate, choose_learning_rate
from metaopt_lens.models import wrap
from metaopt_lens.models.tiny import sample_episode
from metaopt_lens.prompts import Demo
from metaopt_lens.runs import tokenize_for

MLP: Any = ("mlp_in", "mlp_gate", "mlp_out")
LR = 0.05


@cache
def queries() -> tuple[ICLPrompt, ...]:
    """Ten queries behind the same demonstrations, with their labels."""
    found: dict[str, ICLPrompt] = {}
    for prompt in episode_prompts(sample_episode(random.Random(3), n_demos=8, n_categories=2)):
        found.setdefault(prompt.query, prompt)
    return tuple(found.values())[:10]


@cache
def compared() -> tuple[Any, StaticCurve, WeightUpdate, PatchAgainstFinetuning]:
    model = load_tiny()
    curve = static_curve(model, queries()[:5], queries()[5:], n_fit=[5])
    update = finetune(model, queries()[0], lr=LR, projections=MLP, progress=False)
    return model, curve, update, patch_against_finetuning(model, curve, update, seeds=(7, 8))


def brute_force(curve: StaticCurve, update: WeightUpdate) -> torch.Tensor:
    """From the entries of both dense matrices."""
    of_layers = []
    for layer in range(curve.patch.model.n_layers):
        rows = []
        for name in curve.patch.matrices:
            a = curve.patch.dense(layer, name).AB.double().flatten()
            b = getattr(update, f"w_mlp_{name}")[layer].double().flatten()
            rows.append(a @ b / (a @ a).sqrt() / (b @ b).sqrt())
        of_layers.append(torch.stack(rows))
    return torch.stack(of_layers)


def as_update(curve: StaticCurve) -> WeightUpdate:
    """The patch's own changes as an update."""
    patch = curve.patch
    dense = {
        f"w_mlp_{name}": torch.stack([patch.dense(layer, name).AB for layer in range(patch.model.n_layers)])
        for name in patch.matrices
    }
    return WeightUpdate(patch.model, **dense)  # type: ignore[arg-type]


def test_cosines_are_those_of_the_dense_matrices() -> None:
    model, curve, update, found = compared()
    assert found.matrices == ("gate", "in", "out")
    torch.testing.assert_close(found.cosine, brute_force(curve, update), rtol=0, atol=1e-6)
    # The nulls are what their names say: made again here, apart.
    shuffled = [
        finetune(model, shuffle_labels(queries()[5], seed=seed), lr=LR, projections=MLP, progress=False)
        for seed in (7, 8)
    ]
    expected = torch.stack([brute_force(curve, other) for other in shuffled])
    torch.testing.assert_close(found.nulls["shuffled labels"], expected, rtol=0, atol=1e-6)
    assert list(found.nulls) == list(found.null_correct) == ["shuffled labels", "uphill", "unrelated text"]
    assert found.notes == ("the control 'other demonstrations' is left out (it needs a second demonstration set)",)


def test_uphill_is_ascent_of_the_same_loss() -> None:
    """One step for all demonstrations has one gradient: up is the exact opposite of down, and only there."""
    model, curve, several, found = compared()
    one = finetune(model, queries()[0], lr=LR, projections=MLP, batch_size=None, progress=False)
    opposite = patch_against_finetuning(model, curve, one, seeds=(7,))
    torch.testing.assert_close(opposite.nulls["uphill"][0], -opposite.cosine, rtol=0, atol=1e-6)
    assert not torch.allclose(found.nulls["uphill"][0], -found.cosine, rtol=0, atol=1e-6)
    assert len(several.losses) == 8


def test_identical_changes_give_one_and_orthogonal_ones_zero() -> None:
    _, curve, update, _ = compared()
    own = as_update(curve)
    ones = torch.ones(curve.patch.model.n_layers, 3, dtype=torch.float64)
    torch.testing.assert_close(change_cosines(curve.patch, 3.0 * own), ones, rtol=0, atol=1e-6)
    torch.testing.assert_close(change_cosines(curve.patch, -own), -ones, rtol=0, atol=1e-6)
    # What is left of the finetuned change without its part along the patch's.
    rest = {}
    for name, change in update.tensors().items():
        a, b = own.tensors()[name].double(), change.double()
        along = (a * b).sum((1, 2)) / a.square().sum((1, 2))
        rest[name] = b - along[:, None, None] * a
    orthogonal = dataclasses.replace(update, **rest)  # type: ignore[arg-type]
    assert float(change_cosines(curve.patch, orthogonal).abs().max()) < 1e-6


def test_accuracies_are_those_of_plain_runs() -> None:
    model, curve, update, found = compared()
    assert list(found.correct) == ["in context", "zero-shot", "static patch", "finetuned"]
    right = []
    for prompt in curve.asked:
        tokens = tokenize_for(wrap(model), prompt)
        with torch.no_grad(), update.applied(model):
            logits = model(torch.tensor([list(tokens.zero_shot().ids)]))[0, -1]
        # The candidates' first tokens, as the demonstrations show them.
        pairs = zip(prompt.demos, tokens.labels, strict=True)
        firsts = {demo.label: float(logits[tokens.ids[span.start]]) for demo, span in pairs}
        assert set(firsts) == {*(prompt.candidates or firsts), prompt.label}
        right.append(max(firsts, key=firsts.__getitem__) == prompt.label)
    assert found.correct["finetuned"].tolist() == right
    frame = found.accuracy_frame()
    row = frame[frame["setting"] == "finetuned"].iloc[0]
    interval = exact_interval(sum(right), len(right))
    assert interval is not None
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx([end / 100 for end in interval])
    assert (frame["setting"] == "finetuned, shuffled labels").sum() == 2
    assert "held-out queries" in found.sentence


def test_the_frame() -> None:
    *_, found = compared()
    frame = found.to_frame()
    assert len(frame) == 4 * found.cosine.numel()
    row = frame[(frame["update"] == "shuffled labels") & (frame["layer"] == 1) & (frame["matrix"] == "in")].iloc[0]
    draws = found.nulls["shuffled labels"][:, 1, 1]
    assert [row["cosine"], row["lowest"], row["highest"]] == pytest.approx(
        [float(draws.mean()), float(draws.min()), float(draws.max())]
    )
    assert row["draws"] == 2


def test_bad_input() -> None:
    model, curve, update, _ = compared()
    attention = finetune(model, queries()[0], lr=LR, progress=False)
    with pytest.raises(OptionError, match=r"changes no matrix of the MLP.*projections=\('mlp_gate', 'mlp_in', 'mlp_o"):
        patch_against_finetuning(model, curve, attention)
    with pytest.raises(OptionError, match="does not say how it was made"):
        patch_against_finetuning(model, curve, update + update)
    other = finetune(model, shuffle_labels(queries()[0], seed=7), lr=LR, projections=MLP, progress=False)
    with pytest.raises(PromptError, match="was not trained on the patch's demonstrations"):
        patch_against_finetuning(model, curve, other)
    with pytest.raises(PromptError, match="fitted with another prepend_bos"):
        patch_against_finetuning(model, curve, update, prepend_bos=False)


def test_its_own_finetuning_chooses_a_rate_on_the_demonstrations() -> None:
    model, curve, *_ = compared()
    found = patch_against_finetuning(model, curve, seeds=(7,))
    settings = found.finetuned.settings
    assert settings is not None
    rate = choose_learning_rate(
        model, queries()[5].demos[:-2], queries()[5].demos[-2:], projections=MLP, candidates=queries()[5].candidates
    ).lr
    assert settings.lr == rate
    assert set(settings.projections) == set(MLP)
    again = finetune(model, queries()[0], lr=rate, projections=settings.projections, progress=False)
    torch.testing.assert_close(found.cosine, brute_force(curve, again), rtol=0, atol=1e-6)


def test_a_null_that_is_not_possible_is_left_out_by_name() -> None:
    """Demonstrations with one label have no shuffle."""
    model = load_tiny()
    label = queries()[0].demos[0].label
    alike = [prompt.with_demos([Demo(d.input, label) for d in prompt.demos[:2]]) for prompt in queries()[:4]]
    curve = static_curve(model, alike[:2], alike[2:])
    update = finetune(model, alike[0], lr=LR, projections=("mlp_in",), progress=False)
    found = patch_against_finetuning(model, curve, update)
    assert found.matrices == ("in",)
    assert list(found.nulls) == ["uphill", "unrelated text"]
    assert len(found.notes) == 2
    assert "the control 'shuffled labels' is left out (labels cannot be shuffled" in found.notes[0]
