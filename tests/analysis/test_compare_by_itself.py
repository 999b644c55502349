"""compare() without updates: it chooses a rate, finetunes and makes its controls, as one would by hand."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from metaopt_lens import ICLPrompt, MetaoptLensError, choose_learning_rate, compare, finetune, load_tiny
from metaopt_lens.analysis import Comparison, Controls, Finetuning, unrelated_update
from metaopt_lens.experiments.worked_example import draw_prompts

TEXTS = ["red boat , black car", "cow , horse . goat", "rain ? snow ?"]


@cache
def sets() -> list[list[ICLPrompt]]:
    return draw_prompts(2, 3, n_demos=8, seed=5)


def own(**options: Any) -> Comparison:
    prompts = [prompt for group in sets() for prompt in group]
    return compare(load_tiny(), prompts, progress=False, **options)


def test_it_is_finetuning_and_comparing_by_hand() -> None:
    model = load_tiny()
    updates = [finetune(model, group[0], lr=0.05, epochs=2, keep_factors=True, progress=False) for group in sets()]
    texts = [unrelated_update(model, TEXTS, like=update) for update in updates]
    prompts = [prompt for group in sets() for prompt in group]
    quick = Controls.of("quick")
    by_hand = compare(
        model, prompts, updates, controls=dataclasses.replace(quick, updates={"mine": texts}), progress=False
    )
    found = own(controls=dataclasses.replace(quick, texts={"mine": TEXTS}), finetuning=Finetuning(lr=0.05, epochs=2))
    assert [s.name for s in found.statistics] == [s.name for s in by_hand.statistics]
    for a, b in zip(found.statistics, by_hand.statistics, strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=0, atol=0, equal_nan=True)
        assert list(a.nulls) == list(b.nulls)
    torch.testing.assert_close(found["z total"].nulls["mine"], by_hand["z total"].nulls["mine"], rtol=0, atol=0)
    assert found.learning_rate is None
    assert [u.norm() for u in found.updates] == [u.norm() for u in updates]


def test_the_learning_rate_is_chosen_on_held_out_demonstrations_of_the_first_set() -> None:
    found = own(controls="quick")
    first = sets()[0][0]
    choice = choose_learning_rate(
        load_tiny(), first.demos[:-2], first.demos[-2:], template=first.template, candidates=first.candidates
    )
    assert found.learning_rate == choice
    assert {settings["lr"] for settings in found.settings["finetuning"]} == {choice.lr}
    with pytest.raises(MetaoptLensError, match="holds out one demonstration in 4, but there are only 2"):
        compare(load_tiny(), [p.with_demos(p.demos[:2]) for p in sets()[0]], progress=False)


def test_presets_run_what_they_say() -> None:
    rate = Finetuning(lr=0.05)
    nulls = {name: set(own(controls=name, finetuning=rate)["z total"].nulls) for name in ("quick", "standard")}
    assert nulls["quick"] == {"other query", "random"}
    further = {"shuffled labels", "flipped labels", "unrelated text"}
    assert nulls["standard"] - nulls["quick"] == further | {"uphill", "uphill, odd part", "uphill, even part"}
    sceptic = Controls.of("sceptic")
    assert (sceptic.shuffled_labels, sceptic.random_weights) == (4, True)


def test_a_control_that_cannot_be_made_is_left_out_with_a_note() -> None:
    model, group = load_tiny(), sets()[0]
    update = finetune(model, group[0], lr=0.05, progress=False)
    silent = dataclasses.replace(update, settings=None)
    found = compare(model, group, silent, progress=False)
    assert "unrelated text" not in found["z total"].nulls
    assert "uphill" not in found["z total"].nulls
    assert len(found.notes) == 2
    for name, note in zip(("unrelated text", "uphill"), found.notes, strict=True):
        assert note.startswith(f"the control {name!r} is left out (this update does not say how it was")
        assert f"note: {note}" in repr(found)


def test_texts_are_one_list_or_one_for_each_set() -> None:
    rate, quick = Finetuning(lr=0.05), Controls.of("quick")
    each = own(controls=dataclasses.replace(quick, texts={"mine": [TEXTS, TEXTS]}), finetuning=rate)
    one = own(controls=dataclasses.replace(quick, texts={"mine": TEXTS}), finetuning=rate)
    assert torch.equal(each["z total"].nulls["mine"], one["z total"].nulls["mine"])
    with pytest.raises(
        MetaoptLensError, match="texts of 'mine' must be one list of texts, or one list for each of the 2"
    ):
        own(controls=dataclasses.replace(quick, texts={"mine": [TEXTS]}), finetuning=rate)
    with pytest.raises(MetaoptLensError, match="the control 'other query' has the name of another null"):
        own(controls=dataclasses.replace(quick, texts={"other query": TEXTS}), finetuning=rate)
    with pytest.raises(MetaoptLensError, match="lr must be a number or 'auto', got 'best'"):
        Finetuning(lr="best")
