"""The order of the demonstrations: full-batch descent cannot see it, SGD and in-context learning can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hosts import shared

from metaopt_lens import ICLPrompt, Template, finetune, load_tiny, wrap
from metaopt_lens._errors import OptionError
from metaopt_lens.analysis import Finetuning, OrderSpread, order_spread
from metaopt_lens.analysis._order import (
    FULL_BATCH,
    IN_CONTEXT,
    LEARNERS,
    ONE_PASS,
    draw_orders,
    prediction_spread,
    update_spread,
)
from metaopt_lens.runs import record, tokenize_for

NOUNS = [("apple", "dax"), ("hammer", "wug"), ("pear", "dax"), ("saw", "wug"), ("plum", "dax"), ("drill", "wug")]
ASKED = [("cherry", "dax"), ("pliers", "wug"), ("peach", "dax")]


def prompts(n_sets: int = 1) -> list[ICLPrompt]:
    sets = (NOUNS[:4], NOUNS[2:])[:n_sets]
    return [ICLPrompt(demos, query, label=label) for query, label in ASKED for demos in sets]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the statistics --------------------------------------------------------------------------------------------------


def test_spread_is_the_variance_of_pairs_as_a_share() -> None:
    """Half the mean squared distance of pairs, over the mean square; 0 for equal updates, 1 for unrelated ones."""
    base, u = normal(3, 2, 2, 5, seed=0), normal(4, 3, 2, 2, 5, seed=1)
    found = update_spread(base + u, base)
    for query in range(3):
        rows = u[:, query, 1, 0]
        pairs = [float((rows[i] - rows[j]).square().sum()) / 2 for i in range(4) for j in range(i)]
        expected = sum(pairs) / 6 / float(rows.square().sum(-1).mean())
        assert float(found[query, 1, 0]) == pytest.approx(expected)
    assert float(update_spread(base + u[:1].expand(4, 3, 2, 2, 5), base).abs().max()) < 1e-24
    assert update_spread(base.expand(4, 3, 2, 2, 5), base).isnan().all()
    many = normal(2000, 1, 1, 1, 50, seed=2)
    assert float(update_spread(many, torch.zeros(1, 1, 1, 50).double())) == pytest.approx(1, abs=0.01)


def test_distance_and_changed_answers_by_hand() -> None:
    answers = torch.tensor([[[0.6, 0.3, 0.1]], [[0.3, 0.6, 0.1]], [[0.6, 0.0, 0.4]]]).double()
    distance, changed = prediction_spread(answers)
    assert float(distance) == pytest.approx((0.3 + 0.3 + 0.6) / 3)
    assert float(changed) == pytest.approx(2 / 3)


def test_orders_are_different_and_the_given_one_is_first() -> None:
    for n, n_orders in ((3, 6), (4, 10), (12, 20)):
        found = draw_orders(n, n_orders, seed=0)
        assert found[0] == tuple(range(n))
        assert len(set(found)) == n_orders
        assert all(sorted(order) == list(range(n)) for order in found)
        assert found == draw_orders(n, n_orders, seed=0)
    assert draw_orders(12, 3, seed=0) != draw_orders(12, 3, seed=1)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_full_batch_descent_does_not_see_the_order() -> None:
    """In float64: its weights, its updates and its predictions, to rounding. SGD and in-context learning do see it."""
    model = shared("bridge:gpt2", torch.float64)
    demos = [(f"w{i}", f"w{i + 1}") for i in range(30, 50, 5)]
    asked = [ICLPrompt(demos, f"w{i}", Template()) for i in (16, 17, 18)]
    found = order_spread(model, asked, n_orders=4, finetuning=Finetuning(lr=0.05))
    full = found.updates[FULL_BATCH]
    assert float(full.nan_to_num().max()) < 1e-12
    assert not full.isnan().all()
    assert float(found.distances[FULL_BATCH].max()) < 1e-8
    assert float(found.changed[FULL_BATCH].max()) == 0
    for learner in (IN_CONTEXT, ONE_PASS):
        assert float(found.updates[learner].nanmean()) > 1e6 * float(full.nanmean())
        assert float(found.distances[learner].min()) > 1e-7
    orders = [finetune(model, asked[0], lr=0.2, batch_size=None, order=order) for order in found.orders[0]]
    for other in orders[1:]:
        assert (other - orders[0]).norm() < 1e-12 * orders[0].norm()


def test_each_learner_is_what_its_own_runs_say() -> None:
    """Two sets asked in turn; in-context prompts with their demonstrations moved, updates in the drawn order."""
    model, asked = load_tiny(), prompts(2)
    found = order_spread(model, asked, n_orders=3, finetuning=Finetuning(lr=0.02), seed=5)
    assert found.sets.tolist() == [0, 1] * 3
    assert found.orders[0] != found.orders[1]
    wrapped, prompt = wrap(model), asked[1]
    zero = record(wrapped, [tokenize_for(wrapped, prompt)], settings=("zs",))[0].zs.z[-1]
    in_context, trained = [], []
    for order in found.orders[1]:
        moved = tokenize_for(wrapped, prompt.with_demos([prompt.demos[i] for i in order]))
        in_context.append(record(wrapped, [moved], settings=("icl",))[0].icl.z[-1])
        update = finetune(model, prompt, lr=0.02, order=order)
        trained.append(record(wrapped, [moved], settings=("ft",), update=update)[0].ft.z[-1])
    for learner, z in ((IN_CONTEXT, in_context), (ONE_PASS, trained)):
        expected = update_spread(torch.stack(z)[:, None], zero[None])[0]
        torch.testing.assert_close(found.updates[learner][1], expected, rtol=1e-2, atol=1e-5, equal_nan=True)


def test_table_picture_and_file(tmp_path: Path) -> None:
    found = order_spread(load_tiny(), prompts(2), n_orders=2, finetuning=Finetuning(lr=0.02))
    assert found.to_frame()["learner"].tolist() == list(LEARNERS)
    assert found.spread().n_sets == 2
    assert "2 orders of the same demonstrations, 6 queries, over 2 demonstration sets" in repr(found)
    back = OrderSpread.load(found.save(tmp_path / "order"))
    assert repr(back) == repr(found)
    assert back.orders == found.orders
    assert len(found.plot().data) == 2
    with pytest.raises(OptionError, match="there is no learner 'Adam': choose one of 'in context'"):
        found.spread("Adam")


def test_more_orders_than_there_are() -> None:
    with pytest.raises(OptionError, match="got 25: a set of 4 demonstrations has 24 orders, ask for 2 to 24"):
        order_spread(load_tiny(), prompts(), n_orders=25)
    with pytest.raises(OptionError, match="got 1: a set of 4 demonstrations has 24 orders"):
        order_spread(load_tiny(), prompts(), n_orders=1)
    one = [ICLPrompt(NOUNS[:1], query) for query, _ in ASKED]
    with pytest.raises(OptionError, match="got 5: a set of 1 demonstrations has 1 order, give more demonstrations"):
        order_spread(load_tiny(), one)
