"""Size and power of the findings: synthetic updates of which it is known where, and whether, they agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from metaopt_lens import load_tiny
from metaopt_lens.analysis import STATISTICS, Comparison, Finding, Measured, Statistic, findings
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._measuring import Context
from metaopt_lens.analysis._output_parts import PARTS, Subspaces
from metaopt_lens.analysis._pairs import part_name
from metaopt_lens.models import ModelInfo, wrap

F64 = torch.float64
REPETITIONS = 400
N_SETS, PER_SET, N_HEADS, D_MODEL, N_LABELS = 8, 12, 3, 24, 3
N = N_SETS * PER_SET
SETS = torch.arange(N_SETS).repeat_interleave(PER_SET)
DIRECTIONS = torch.randn(N_LABELS, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.5
SPACES = Subspaces.of(DIRECTIONS)
Updates = tuple[Tensor, Tensor, Tensor]  # in context, finetuned, in context behind shuffled labels


@cache
def info() -> ModelInfo:
    return wrap(load_tiny()).info


def noise(rng: torch.Generator) -> Tensor:
    """Of every query and head, with a component that the queries of a set share."""
    shared = torch.randn(N_SETS, 1, N_HEADS, D_MODEL, generator=rng, dtype=F64)
    own = torch.randn(N_SETS, PER_SET, N_HEADS, D_MODEL, generator=rng, dtype=F64)
    return (shared + own).flatten(0, 1)


def independent(rng: torch.Generator) -> Updates:
    return noise(rng), noise(rng), noise(rng)


def same_format(rng: torch.Generator) -> Updates:
    """ "Answer with a label", whichever labels the demonstrations have."""
    shared = 4 * SPACES.format[:, 0]
    return noise(rng) + shared, noise(rng) + shared, noise(rng) + shared


def same_contrast(rng: torch.Generator) -> Updates:
    """The same label for each query in context and after finetuning; another one behind shuffled labels."""
    right, wrong = (
        4 * torch.randn(N, 1, N_LABELS - 1, generator=rng, dtype=F64) @ SPACES.contrast.mT for _ in range(2)
    )
    return noise(rng) + right, noise(rng) + right, noise(rng) + wrong


def hidden_gradient_descent(rng: torch.Generator) -> Updates:
    """Von Oswald's head on planted linear tasks, each label's slot written along its direction.

    Tokens (x, y), W_K = W_Q = diag(I, 0), W_V = [[0, 0], [W_0, -I]], output projection (eta / N) I: minus the y part of
    the head's output is the change that a gradient step makes to the prediction. Finetuning takes it by autograd.
    """
    d_x, n_demos, eta = 6, 12, 0.5

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64)

    icl, ft, shuffled = [], [], []
    for _ in range(N_SETS):
        task, start = draw(N_LABELS, d_x), 0.1 * draw(N_LABELS, d_x)
        x, queries = draw(n_demos, d_x), draw(PER_SET, d_x)
        y = x @ task.mT
        w_v = torch.zeros(d_x + N_LABELS, d_x + N_LABELS, dtype=F64)
        w_v[d_x:, :d_x], w_v[d_x:, d_x:] = start, -torch.eye(N_LABELS, dtype=F64)

        def attended(labels: Tensor, x: Tensor = x, w_v: Tensor = w_v, queries: Tensor = queries) -> Tensor:
            values = torch.cat([x, labels], dim=-1) @ w_v.mT
            scores = queries @ x.mT  # keys and queries are the x slots
            return -(eta / n_demos) * (scores @ values)[:, d_x:]

        weights = start.clone().requires_grad_()
        ((x @ weights.mT - y).square().sum() / (2 * n_demos)).backward()
        assert weights.grad is not None
        step = -eta * weights.grad
        torch.testing.assert_close(attended(y), queries @ step.mT, rtol=0, atol=1e-10)
        icl.append(attended(y))
        ft.append(queries @ step.mT)
        shuffled.append(attended(y[torch.randperm(n_demos, generator=rng)]))
    written = [(torch.cat(rows) @ DIRECTIONS)[:, None] for rows in (icl, ft, shuffled)]
    first, second, third = (rows / rows.norm(dim=-1).mean() * 8 + noise(rng) for rows in written)
    return first, second, third


def row(name: str) -> Statistic:
    return next(s for s in STATISTICS if s.name == name)


def measured(
    name: str, read: Callable[[Tensor], Tensor], extra: tuple[Tensor, ...], updates: Updates, rng: torch.Generator
) -> Measured:
    """A row of the table, with the nulls of further runs as `compare` makes them."""
    icl, ft, shuffled = (read(u)[:, None] for u in updates)
    context = Context(Convention.DEFAULT, rng, 2, {}, D_MODEL)
    found = row(name).measure((icl, ft, *extra), context)
    uphill = -ft + 0.1 * torch.randn(ft.shape, generator=rng, dtype=F64)
    further = {
        "shuffled labels": row(name).value((shuffled, ft, *extra), context),
        "uphill": row(name).value((icl, uphill, *extra), context),
    }
    found.nulls.update(further)
    return found


def answers(share: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(N, generator=rng) < share).long()


def similarities(draw: Callable[[torch.Generator], Updates], rng: torch.Generator) -> tuple[Measured, ...]:
    updates = draw(rng)
    statistics = [measured("z total", lambda u: u, (), updates, rng)]
    for part in PARTS:
        about = torch.zeros(N, dtype=torch.int64), torch.full((N,), SPACES.dims(part))
        coordinates = lambda u, part=part: SPACES.coordinates(u, part)  # noqa: E731
        statistics.append(measured(part_name("z total", part), coordinates, about, updates, rng))
    other = 0.1 * torch.randn(2, N, 1, 1, generator=rng)
    return *statistics, Measured("SimAOU", "", "layer", "query", other[0], {"analytic": other[1]})


def comparison(statistics: tuple[Measured, ...], rng: torch.Generator, *, learns: float) -> Comparison:
    return Comparison(
        model=info(),
        statistics=statistics,
        sets=SETS,
        norms={},
        gold=torch.ones(N, dtype=torch.int64),
        zs=answers(0.5, rng),
        icl=answers(learns, rng),
        ft=answers(learns, rng),
        flipped_gold=torch.zeros(N, dtype=torch.int64),
        controlled={"ICL, flipped labels": answers(1 - learns if learns > 0.5 else 0.5, rng)[None]},
        n_demos=(8,) * N_SETS,
        settings={},
        provenance={},
    )


@cache
def found(draw: Callable[[torch.Generator], Updates]) -> list[dict[str, Finding]]:
    """Of a model that learns, in context and finetuned: otherwise similarities are not interpreted."""
    draws = []
    for seed in range(REPETITIONS):
        rng = torch.Generator().manual_seed(seed)
        draws.append(asked(comparison(similarities(draw, rng), rng, learns=1.0)))
    return draws


@cache
def of_a_model_that_guesses() -> list[dict[str, Finding]]:
    """Updates do not matter here, and are drawn once. Accuracies are coarse, so there are more repetitions."""
    rng = torch.Generator().manual_seed(0)
    once = similarities(independent, rng)
    return [asked(comparison(once, rng, learns=0.5)) for _ in range(2 * REPETITIONS)]


def asked(one: Comparison) -> dict[str, Finding]:
    return {finding.key: finding for finding in findings(one)}


def coverage(draws: list[dict[str, Finding]], key: str, truth: float = 0.0) -> float:
    return sum(one[key].low <= truth <= one[key].high for one in draws) / len(draws)


def share(draws: list[dict[str, Finding]], key: str, answer: str) -> float:
    return sum(one[key].answer == answer for one in draws) / len(draws)


LABELS, UPHILL, OTHER = "control:shuffled labels", "control:uphill", "control:other query"


@pytest.mark.parametrize("key", ["in_context_learning", "finetuning", "prior"])
def test_intervals_of_accuracies_cover_where_nothing_is_learned(key: str) -> None:
    draws = of_a_model_that_guesses()
    assert 0.93 <= coverage(draws, key) <= 0.97
    assert share(draws, key, "unclear") == coverage(draws, key)


@pytest.mark.parametrize("key", ["direction", LABELS, UPHILL, OTHER, "sim_aou"])
def test_intervals_cover_where_updates_are_independent(key: str) -> None:
    draws = found(independent)
    assert 0.93 <= coverage(draws, key) <= 0.97
    assert share(draws, key, "unclear") == coverage(draws, key)


def test_a_shared_format_is_found_and_is_not_taken_for_the_labels() -> None:
    draws = found(same_format)
    assert share(draws, "direction", "yes") >= 0.9
    for key in (LABELS, OTHER):
        assert 0.93 <= coverage(draws, key) <= 0.97, key
    assert all("in the contrast part" in one[LABELS].what for one in draws)


@pytest.mark.parametrize("draw", [same_contrast, hidden_gradient_descent])
@pytest.mark.parametrize("key", ["direction", LABELS, UPHILL, OTHER])
def test_what_depends_on_the_labels_is_found(draw: Callable[[torch.Generator], Updates], key: str) -> None:
    assert share(found(draw), key, "yes") >= 0.9


@pytest.mark.parametrize("key", ["in_context_learning", "finetuning", "prior"])
def test_planted_learning_is_found(key: str) -> None:
    assert share(found(same_contrast), key, "yes") >= 0.9
