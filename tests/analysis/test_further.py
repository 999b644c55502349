"""The sceptic's further questions: run together, joined over sets, kept in files, answered in sentences."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from metaopt_lens import Comparison, ICLPrompt, compare, finetune, load_tiny, wrap
from metaopt_lens.analysis import Controls, Further, findings, join_further
from metaopt_lens.analysis._algebra import OTHER_TASK, SCALED_SUM
from metaopt_lens.analysis._ceiling import CEILING, CONSTANT, SCALED
from metaopt_lens.analysis._demo_sets import group_sets
from metaopt_lens.analysis._further import run_further
from metaopt_lens.analysis._ladder import GRADIENT_DESCENT
from metaopt_lens.analysis._order import IN_CONTEXT, ONE_PASS

NOUNS = [("apple", "dax"), ("hammer", "wug"), ("pear", "dax"), ("saw", "wug"), ("plum", "dax"), ("drill", "wug")]
ASKED = [("cherry", "dax"), ("pliers", "wug"), ("peach", "dax"), ("chisel", "wug"), ("lemon", "dax")]


def prompts() -> list[ICLPrompt]:
    """Two sets, one after the other."""
    return [ICLPrompt(demos, query, label=label) for demos in (NOUNS[:4], NOUNS[2:]) for query, label in ASKED]


def further(asked: list[ICLPrompt]) -> tuple[Further, list[str]]:
    model = wrap(load_tiny())
    groups = group_sets(model, asked, prepend_bos=None)
    updates = [finetune(model, group.prompts[0], lr=0.02) for group in groups]
    return run_further(model, asked, groups, updates, prepend_bos=None, allow_processed=False, batch_size=None, seed=3)


def test_all_of_it_and_what_is_left_out() -> None:
    found, notes = further(prompts())
    assert all(getattr(found, field.name) is not None for field in dataclasses.fields(found))
    assert notes == []
    assert found.algebra is not None
    assert OTHER_TASK in found.algebra.additivity.errors
    few, notes = further(prompts()[3:5] + prompts()[8:])
    assert few.ceiling is few.ladder is few.algebra is None
    assert few.order is not None
    assert "the best possible update is left out (n_folds must be at least 3, got 2" in notes[0]


def test_sets_run_one_by_one_are_joined() -> None:
    """As a run does: what is fitted within a set is the same, and intervals are over both sets."""
    whole, _ = further(prompts())
    parts = [further(prompts()[:5])[0], further(prompts()[5:])[0]]
    joined = join_further(parts)
    assert joined is not None
    for found in (joined.ceiling, joined.ladder, joined.order, joined.algebra):
        assert found is not None
        assert found.sets.tolist() == [0] * 5 + [1] * 5
    assert whole.ceiling is not None
    assert joined.ceiling is not None
    assert joined.algebra is not None
    assert whole.algebra is not None
    torch.testing.assert_close(joined.ceiling["value"].errors[CEILING], whole.ceiling["value"].errors[CEILING])
    torch.testing.assert_close(joined.algebra.squares, whole.algebra.squares, equal_nan=True)
    assert joined.ceiling.r_squared().n_sets == 2
    assert joined.order is not None
    assert len(joined.order.orders) == len(joined.order.rates) == 2
    assert join_further([parts[0], None]) is None
    without = dataclasses.replace(parts[1], order=None)
    left = join_further([parts[0], without])
    assert left is not None
    assert left.order is None
    assert left.ladder is not None


def test_a_comparison_asks_them_and_answers_in_sentences(tmp_path: Path) -> None:
    """Estimates are those of the results themselves; files keep them; a quick comparison asks nothing further."""
    model, asked = load_tiny(), prompts()
    updates = [finetune(model, asked[number], lr=0.02) for number in (0, 5)]
    controls = Controls(shuffled_labels=0, flipped_labels=False, unrelated_text=False, uphill=False, further=True)
    found = compare(model, asked, updates, controls=controls, progress=False)
    assert found.further is not None
    answers = {f.key: f for f in findings(found)}
    further = found.further
    assert further.ceiling is not None
    assert further.ladder is not None
    assert further.order is not None
    assert further.algebra is not None
    for key, expected in {
        "ceiling": further.ceiling.r_squared(SCALED).estimate - further.ceiling.r_squared(CONSTANT).estimate,
        "ladder": further.ladder.r_squared(GRADIENT_DESCENT).estimate - further.ladder.r_squared(CONSTANT).estimate,
        "order": further.order.spread(IN_CONTEXT).estimate - further.order.spread(ONE_PASS).estimate,
        "algebra": further.algebra.r_squared(SCALED_SUM).estimate - further.algebra.r_squared(OTHER_TASK).estimate,
    }.items():
        assert answers[key].estimate == pytest.approx(float(expected), abs=1e-6), key
        assert answers[key].n_sets == 2
    assert "one constant vector" in answers["ladder"].sentence
    assert "can reach R^2" in answers["ceiling"].sentence
    back = Comparison.load(found.save(tmp_path / "comparison"))
    assert back.further is not None
    assert repr(back.further.ladder) == repr(further.ladder)
    assert [f.sentence for f in findings(back)] == [f.sentence for f in findings(found)]
    assert Controls.of("sceptic").further
    assert not Controls.of("standard").further
    plain = compare(model, asked, updates, controls="quick", progress=False)
    assert plain.further is None
    assert not {"ceiling", "ladder", "order", "algebra"} & {f.key for f in findings(plain)}
