"""Shuffled labels carry nothing, flipped labels carry another task: by their distribution and by what is answered."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from scipy import stats

from metaopt_lens import ICLPrompt, MetaoptLensError, load_tiny
from metaopt_lens.analysis import Comparison, Controls, compare, flip_labels, mean_interval, shuffle_labels
from metaopt_lens.experiments._join import join_comparisons
from metaopt_lens.experiments.worked_example import draw_prompts
from metaopt_lens.finetuning import finetune
from metaopt_lens.models.tiny import CATEGORIES, LABELS, Episode, accuracy

DEMOS = [("w30", "w32"), ("w34", "w36"), ("w38", "w32"), ("w42", "w36"), ("w43", "w32"), ("w44", "w36")]


def test_shuffled_labels_are_a_uniform_permutation() -> None:
    """Of three and three labels: all 20 arrangements equally often; each place keeps its label in half the draws."""
    prompt, draws = ICLPrompt(DEMOS, "w16", label="w32"), 4000
    moved = [shuffle_labels(prompt, seed=seed) for seed in range(draws)]
    arrangements = Counter(tuple(d.label for d in p.demos) for p in moved)
    assert len(arrangements) == 20
    assert stats.chisquare(list(arrangements.values())).pvalue > 0.001
    kept = [sum(p.demos[i].label == label for p in moved) for i, (_, label) in enumerate(DEMOS)]
    assert all(stats.binomtest(k, draws, 0.5).pvalue > 0.001 for k in kept)
    for p in moved[:20]:
        assert [d.input for d in p.demos] == [text for text, _ in DEMOS]
        assert sorted(d.label for d in p.demos) == sorted(label for _, label in DEMOS)
        assert (p.query, p.label) == ("w16", "w32")


def test_flipped_labels_are_a_consistent_map_that_leaves_no_word_in_place() -> None:
    demos = [*DEMOS, ("w50", "w60"), ("w51", "w61")]
    maps = set()
    for seed in range(300):
        moved = flip_labels(ICLPrompt(demos, "w16", label="w60"), seed=seed)
        pairs = {(label, d.label) for (_, label), d in zip(demos, moved.demos, strict=True)}
        assert len(pairs) == 4  # one image for each word
        assert sorted(after for _, after in pairs) == ["w32", "w36", "w60", "w61"]
        assert all(before != after for before, after in pairs)
        assert ("w60", moved.label) in pairs
        maps.add(frozenset(pairs))
    assert len(maps) == 9  # every derangement of four words
    assert flip_labels(ICLPrompt(DEMOS, "w16", label="w99"), seed=0).label is None  # no demonstration shows w99


def test_a_single_label_can_be_neither_shuffled_nor_flipped() -> None:
    prompt = ICLPrompt([("w30", "w32"), ("w31", "w32")], "w16")
    with pytest.raises(MetaoptLensError, match="labels cannot be shuffled: all demonstrations have the same one"):
        shuffle_labels(prompt, seed=0)
    with pytest.raises(MetaoptLensError, match="labels cannot be flipped: all demonstrations have the same one"):
        flip_labels(prompt, seed=0)


def balanced(n_categories: int, n_queries: int, seed: int) -> list[ICLPrompt]:
    """Queries behind as many demonstrations of every label, about 16: only then is 1 / n_categories chance.

    Where labels are not balanced, a model without a binding answers the more frequent label, and the nouns that are
    left to be asked belong to the less frequent one more often.
    """
    rng = random.Random(seed)
    categories, labels = rng.sample(list(CATEGORIES), n_categories), rng.sample(LABELS, n_categories)
    nouns = [rng.sample(CATEGORIES[category], len(CATEGORIES[category])) for category in categories]
    each = 16 // n_categories
    demos = [(noun, label) for words, label in zip(nouns, labels, strict=True) for noun in words[:each]]
    rng.shuffle(demos)
    asked = [(nouns[i % n_categories][each + i // n_categories], labels[i % n_categories]) for i in range(n_queries)]
    return [ICLPrompt(demos, noun, label=label, candidates=labels) for noun, label in asked]


@pytest.mark.parametrize("n_categories", [2, 3, 4])
def test_the_bundled_model_is_at_chance_behind_shuffled_labels_and_follows_flipped_ones(n_categories: int) -> None:
    """The permutation of 0.1, which moved as many labels as it could, is answered against the gold label: 0 to 6 %."""
    model, n = load_tiny(), 400
    prompts = [balanced(n_categories, 1, seed)[0] for seed in range(n)]

    def share(moved: list[ICLPrompt], answers: list[str | None]) -> float:
        episodes = [
            Episode(tuple((d.input, d.label) for d in p.demos), p.query, answer or "", p.candidates or ())
            for p, answer in zip(moved, answers, strict=True)
        ]
        return accuracy(model, episodes)["candidates"]

    gold = [p.label for p in prompts]
    assert share(prompts, gold) >= 0.9
    shuffled = share([shuffle_labels(p, seed=i) for i, p in enumerate(prompts)], gold)
    chance = 1 / n_categories
    assert abs(shuffled - chance) < 3.3 * (chance * (1 - chance) / n) ** 0.5
    flipped = [flip_labels(p, seed=i) for i, p in enumerate(prompts)]
    assert share(flipped, [p.label for p in flipped]) >= 0.9
    assert share(flipped, gold) <= 0.1


def only(**changes: Any) -> Controls:
    return dataclasses.replace(Controls.of("quick"), n_null_draws=1, **changes)


@cache
def tiny_comparison() -> Comparison:
    """Six sets of two categories: what compare records about the controls."""
    model = load_tiny()
    sets = [balanced(2, 4, seed) for seed in range(6)]
    updates = [finetune(model, group[0], lr=0.05, progress=False) for group in sets]
    prompts = [p for group in sets for p in group]
    return compare(model, prompts, updates, controls=only(shuffled_labels=2, flipped_labels=True), progress=False)


def test_compare_reports_what_is_answered_behind_shuffled_and_flipped_labels() -> None:
    found = tiny_comparison()
    table = found.accuracies().set_index("quantity")
    assert {name: tuple(t.shape) for name, t in found.controlled.items()} == {
        "ICL, shuffled labels": (2, 24),
        "FT, shuffled labels": (2, 24),
        "ICL, flipped labels": (1, 24),
        "FT, flipped labels": (1, 24),
    }
    for setting in ("ICL", "FT"):
        row = table.loc[f"accuracy {setting}, shuffled labels"]
        assert row["low"] <= 0.5 <= row["high"]
    assert table.loc["accuracy ICL", "value"] > 0.9
    assert table.loc["accuracy ICL, flipped labels, against the flipped", "value"] > 0.9
    assert table.loc["accuracy ICL, flipped labels, against the natural", "value"] < 0.1
    assert set(table["n"]) == {24}
    assert table.loc["accuracy ICL", "value"] == pytest.approx(float((found.icl == found.gold).double().mean()))
    hits = (found.controlled["ICL, shuffled labels"] == found.gold).double().mean(0)
    direct = mean_interval(hits, sets=found.sets)
    row = table.loc["accuracy ICL, shuffled labels"]
    assert (row["value"], row["low"]) == pytest.approx((float(direct.estimate), float(direct.low)))
    assert {"shuffled labels", "flipped labels"} <= set(found["z total"].nulls)


def test_the_null_is_the_mean_over_the_draws() -> None:
    model = load_tiny()
    (group,) = draw_prompts(1, 2, n_demos=8, seed=5)
    update = finetune(model, group[0], lr=0.05, progress=False)

    def null(n_draws: int, seed: int) -> torch.Tensor:
        found = compare(model, group, update, controls=only(shuffled_labels=n_draws), seed=seed, progress=False)
        return found["z total"].nulls["shuffled labels"]

    single = [null(1, seed) for seed in range(3)]
    torch.testing.assert_close(null(3, 0), torch.stack(single).mean(0), rtol=0, atol=1e-5)
    assert not torch.allclose(single[0], single[1], atol=1e-3)


def test_without_the_settings_of_finetuning_only_the_in_context_answers_are_reported() -> None:
    model = load_tiny()
    (group,) = draw_prompts(1, 2, n_demos=8, seed=5)
    update = finetune(model, group[0], lr=0.05, progress=False)
    bare = dataclasses.replace(update, settings=None, factors=None)
    found = compare(model, group, bare, controls=only(shuffled_labels=1, flipped_labels=True), progress=False)
    assert set(found.controlled) == {"ICL, shuffled labels", "ICL, flipped labels"}


def test_joined_comparisons_keep_the_controls() -> None:
    found = tiny_comparison()
    both = join_comparisons([found, found])
    assert both.flipped_gold is not None
    assert both.flipped_gold.tolist() == 2 * found.flipped_gold.tolist()  # type: ignore[union-attr]
    assert both.controlled["FT, shuffled labels"].shape == (2, 48)
