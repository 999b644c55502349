"""The sceptic's further questions: run together, joined over sets, kept in files, answered in sentences."""

from __future__ import annotations

import dataclasses

import torch

from metaopt_lens import ICLPrompt, finetune, load_tiny, wrap
from metaopt_lens.analysis import Further, join_further
from metaopt_lens.analysis._ceiling import CEILING
from metaopt_lens.analysis._demo_sets import group_sets
from metaopt_lens.analysis._further import run_further

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
    assert notes == ["another task's demonstrations are left out (the tokenizer does not know our words)"]
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
