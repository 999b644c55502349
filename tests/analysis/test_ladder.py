"""Optimisers built by hand stand on their own rung; random sets and noise on none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import prompt as host_prompt
from hosts import shared
from torch import Tensor

from metaopt_lens import ICLPrompt, load_tiny, wrap
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens._types import TokenSpan
from metaopt_lens.analysis import OptimiserLadder, optimiser_ladder
from metaopt_lens.analysis._held_out import explained
from metaopt_lens.analysis._ladder import (
    ANY_MAP,
    CONSTANT,
    DIAGONAL,
    GD_PLUS_PLUS,
    GRADIENT_DESCENT,
    PRECONDITIONED,
    RUNGS,
    climb,
    curved_update,
    gated,
)
from metaopt_lens.dual import split_linear
from metaopt_lens.runs import delta_w_icl, record, tokenize_for

D_X, D_Y, N = 4, 3, 9
NOUNS = [("apple", "dax"), ("hammer", "wug"), ("pear", "dax"), ("saw", "wug"), ("plum", "dax"), ("drill", "wug")]
ASKED = [("cherry", "dax"), ("pliers", "wug"), ("peach", "dax"), ("chisel", "wug"), ("lemon", "dax"), ("axe", "wug")]


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Tasks:
    """Linear regression tasks, one a demonstration set, in von Oswald's construction: keys x_i, values W_0 x_i - y_i,
    each asked about some queries. Steps are written out as loops over the examples."""

    def __init__(self, n_sets: int = 6, n_queries: int = 8, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.w0 = normal(D_Y, D_X, generator=g)
        scales = torch.tensor([2.0, 1.0, 0.5, 0.25]).double()  # inputs with a direction of high curvature
        self.x = [scales * normal(N, D_X, generator=g) for _ in range(n_sets)]
        self.y = [x @ normal(D_X, D_Y, generator=g) for x in self.x]
        self.asked = [scales * normal(n_queries, D_X, generator=g) for _ in range(n_sets)]
        self.sets = torch.arange(n_sets).repeat_interleave(n_queries)
        self.gate = 0.1 + 0.8 * torch.rand(len(self.sets), generator=g, dtype=torch.float64)

    def step(self, task: int) -> Tensor:
        """``dW = -(1/N) sum_i (W_0 x_i - y_i) x_i^T``."""
        step = torch.zeros(D_Y, D_X).double()
        for x, y in zip(self.x[task], self.y[task], strict=True):
            step -= torch.outer(self.w0 @ x - y, x) / N
        return step

    def curvature(self, task: int) -> Tensor:
        total = torch.zeros(D_X, D_X).double()
        for x in self.x[task]:
            total += torch.outer(x, x)
        return total

    def updates(self, update: Any) -> Tensor:
        """``update(task, query)`` of every query, ``[query, 1, 1, d_y]``."""
        rows = [update(task, q) for task, asked in enumerate(self.asked) for q in asked]
        return torch.stack(rows)[:, None, None]

    def linear(self) -> Tensor:
        """``dW_ICL q`` by the library's linear form."""
        rows = []
        for x, y, asked in zip(self.x, self.y, self.asked, strict=True):
            v = x @ self.w0.T - y
            visible = torch.ones(len(asked), N, dtype=torch.bool)
            # Heads have keys and values of one size: values in front, 0 behind.
            values = torch.nn.functional.pad(v, (0, D_X - D_Y))
            parts = split_linear(asked[:, None], x[:, None], values[:, None], visible, TokenSpan(0, N))
            rows.append(parts.meta_gradient[:, 0, :D_Y])
        return torch.cat(rows)[:, None, None]

    def r_squared(self, update: Tensor, folds: Tensor | None = None, *, centred: bool = False) -> dict[str, float]:
        predictions = climb(
            update,
            linear=self.linear(),
            curved=self.updates(lambda task, q: -N * self.step(task) @ self.curvature(task) @ q),
            gate=self.gate[:, None, None],
            q=torch.cat(self.asked)[:, None, None],
            folds=self.sets if folds is None else folds,
            centred_in=self.sets if centred else None,
        )
        if centred:
            means = torch.stack([update[self.sets == task].mean(0) for task in self.sets])
            update = update - means
        found = explained(update, predictions)
        return {name: float(found.r_squared(name, self.sets).mean()) for name in predictions}


def stands_on(found: dict[str, float], rung: str, *, not_on: tuple[str, ...]) -> None:
    assert found[rung] == pytest.approx(1, abs=1e-6)
    for name in not_on:
        assert found[name] < 0.9, name


def test_gradient_descent_stands_on_the_first_rung() -> None:
    """And on those above it, which contain it; with the gate it does not, and no map of q alone knows the task."""
    tasks = Tasks()
    found = tasks.r_squared(tasks.updates(lambda task, q: 0.3 * tasks.step(task) @ q))
    stands_on(found, GRADIENT_DESCENT, not_on=(gated(GRADIENT_DESCENT), CONSTANT, ANY_MAP))
    for rung in RUNGS:
        assert found[rung] == pytest.approx(1, abs=1e-6)
    assert found[ANY_MAP] < 0.5


def test_the_sign_of_the_step_is_not_what_is_judged() -> None:
    """Uphill is a negative gamma: the ladder says which form, `compare` says which way."""
    tasks = Tasks()
    found = tasks.r_squared(tasks.updates(lambda task, q: -0.3 * tasks.step(task) @ q))
    assert found[GRADIENT_DESCENT] == pytest.approx(1, abs=1e-6)


def test_gd_plus_plus_stands_on_its_own() -> None:
    tasks = Tasks()
    eye = torch.eye(D_X).double()
    update = tasks.updates(lambda task, q: tasks.step(task) @ (eye - 0.05 * tasks.curvature(task)) @ q)
    stands_on(tasks.r_squared(update), GD_PLUS_PLUS, not_on=(GRADIENT_DESCENT, DIAGONAL, PRECONDITIONED))


def test_preconditioned_descent_stands_on_its_own() -> None:
    tasks = Tasks()
    p = normal(D_Y, D_Y, generator=torch.Generator().manual_seed(7))
    found = tasks.r_squared(tasks.updates(lambda task, q: p @ tasks.step(task) @ q))
    stands_on(found, PRECONDITIONED, not_on=(GRADIENT_DESCENT, GD_PLUS_PLUS, DIAGONAL, ANY_MAP))
    diagonal = torch.diag(torch.tensor([3.0, -1.0, 0.2]).double())
    found = tasks.r_squared(tasks.updates(lambda task, q: diagonal @ tasks.step(task) @ q))
    stands_on(found, DIAGONAL, not_on=(GRADIENT_DESCENT, GD_PLUS_PLUS))
    assert found[PRECONDITIONED] == pytest.approx(1, abs=1e-6)


def test_a_gated_step_stands_on_the_gated_rung() -> None:
    tasks = Tasks()
    update = tasks.gate[:, None, None, None] * tasks.updates(lambda task, q: tasks.step(task) @ q)
    stands_on(tasks.r_squared(update), gated(GRADIENT_DESCENT), not_on=())
    assert tasks.r_squared(update)[GRADIENT_DESCENT] < 0.99


def test_a_constant_hides_a_step_unless_it_is_left_out() -> None:
    """A large vector that all tasks share: the step is found in what differs between the queries of a task."""
    tasks = Tasks()
    common = 200 * normal(1, 1, 1, D_Y, generator=torch.Generator().manual_seed(5))
    update = common + tasks.updates(lambda task, q: tasks.step(task) @ q)
    found = tasks.r_squared(update)
    assert found[CONSTANT] > 0.9
    assert found[GRADIENT_DESCENT] < 0.5
    found = tasks.r_squared(update, centred=True)
    stands_on(found, GRADIENT_DESCENT, not_on=(CONSTANT, ANY_MAP))


def test_noise_stands_on_none() -> None:
    tasks = Tasks()
    g = torch.Generator().manual_seed(1)
    draws = [tasks.r_squared(normal(48, 1, 1, D_Y, generator=g)) for _ in range(20)]
    for name in draws[0]:
        assert sum(found[name] for found in draws) / 20 <= 0.01


def test_behind_one_set_any_map_of_q_does_as_well() -> None:
    """Why sets are left out where there are enough: P dW_ICL is any matrix if P may be."""
    tasks = Tasks(n_sets=1, n_queries=20)
    anything = normal(D_Y, D_X, generator=torch.Generator().manual_seed(3))
    found = tasks.r_squared(tasks.updates(lambda task, q: anything @ q), folds=torch.arange(20) % 5)
    assert found[ANY_MAP] == pytest.approx(1, abs=1e-6)
    few = Tasks(n_sets=1, n_queries=20)
    few.w0 = few.w0[:, :1] @ few.w0[:1]  # any task
    own = few.r_squared(few.updates(lambda task, q: few.step(task) @ q), folds=torch.arange(20) % 5)
    assert own[ANY_MAP] == pytest.approx(1, abs=1e-6)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:mistral"])
def test_the_curved_update_is_the_product_of_its_matrices(name: str) -> None:
    """Grouped-query heads and a sliding window included."""
    model = wrap(shared(name))
    run = record(model, [tokenize_for(model, host_prompt())], settings=("icl",))[0].icl
    found = curved_update(run)
    for layer in range(model.info.n_layers):
        seen = run.visible[layer, -1] & run.in_demos
        for head in range(model.info.n_heads):
            kv = head * model.info.n_kv_heads // model.info.n_heads
            k = run.k_of(layer)[seen, kv].double()
            expected = delta_w_icl(run, layer).AB[kv].double() @ (k.T @ k) @ run.q[-1, layer, head].double()
            torch.testing.assert_close(found[layer, head], expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_one_set_and_with_three(tmp_path: Path) -> None:
    model = load_tiny()
    demos = (NOUNS[:4], NOUNS[2:], NOUNS[1:5])
    asked = [ICLPrompt(d, query, label=label) for query, label in ASKED for d in demos]
    found = optimiser_ladder(model, asked)
    assert (found.left_out, found.n_folds) == ("sets", 3)
    assert found.sets.tolist() == [0, 1, 2] * 6
    assert found.rungs == (CONSTANT, ANY_MAP, *RUNGS, *map(gated, RUNGS))
    assert found.per_head(GRADIENT_DESCENT).shape == (3, 4)
    assert found.r_squared(GRADIENT_DESCENT).n_sets == 3
    assert "sets left out in 3 folds, over 3 demonstration sets" in repr(found)
    assert repr(OptimiserLadder.load(found.save(tmp_path / "ladder"))) == repr(found)
    assert len(found.plot().data) == 2
    one = optimiser_ladder(model, asked[::3], target="direct", n_folds=3, centred=True)
    assert (one.left_out, one.n_folds) == ("queries", 3)
    assert "direct in-context update of z, less its mean over the queries of a set, 6 queries" in repr(one)
    assert "conditional on these demonstrations" in repr(one)


def test_refusals() -> None:
    asked = [ICLPrompt(NOUNS[:4], query) for query, _ in ASKED]
    with pytest.raises(OptionError, match="target must be 'total' or 'direct', got 'all'"):
        optimiser_ladder(load_tiny(), asked, target="all")
    with pytest.raises(
        PromptError, match="needs at least 5 queries behind every demonstration set, got 4: give 1 more"
    ):
        optimiser_ladder(load_tiny(), asked[:4])
    with pytest.raises(OptionError, match="n_folds must be at least 3, got 1"):
        optimiser_ladder(load_tiny(), asked, n_folds=1)
    with pytest.raises(OptionError, match="there is no predictor 'Adam': choose one of one constant vector"):
        optimiser_ladder(load_tiny(), asked).r_squared("Adam")
