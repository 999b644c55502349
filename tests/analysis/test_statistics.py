"""The table of statistics, its nulls against brute force, and what it takes to add to it."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hosts import shared, tokenized

from metaopt_lens import ICLPrompt
from metaopt_lens.analysis import NULLS, STATISTICS, Comparison, Controls, Measures, Statistic, compare, flip_labels
from metaopt_lens.analysis import _measure_set as measuring
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._demo_sets import group_sets
from metaopt_lens.analysis._label_answers import Choices, label_words
from metaopt_lens.analysis._matrices import Factors, frobenius_cosine, overlap, principal_angles, spectrum
from metaopt_lens.analysis._measure_set import Variant, measure_set
from metaopt_lens.analysis._measuring import Context
from metaopt_lens.analysis._null_values import other_query_cosines, other_query_values, random_cosines
from metaopt_lens.analysis._output_space import OutputSpace
from metaopt_lens.analysis._similarity import cosine
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.models import wrap
from metaopt_lens.runs import Keep, record, through_w_o

F64 = torch.float64
NAME = "bridge:llama"
DEMOS = [("w30 w31", "w32"), ("w34", "w36"), ("w38 w39", "w32"), ("w42", "w36")]
PROMPTS = [ICLPrompt(DEMOS, q, label=label) for q, label in (("w16 w17", "w36"), ("w18", "w32"), ("w19 w20", "w32"))]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---- nulls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, torch.tensor([0, 1, 0, 2, 1, 0])])
def test_other_query_null_is_the_mean_over_all_other_queries(groups: torch.Tensor | None) -> None:
    first, second = randn(6, 2, 3, 5), randn(6, 2, 3, 5, seed=1)
    second[2, 1] = torch.nan  # left out of the others' means
    found = other_query_cosines(first, second, groups=groups)
    for i in range(6):
        others = [j for j in range(6) if j != i and (groups is None or groups[j] == groups[i])]
        if not others:
            assert found[i].isnan().all()
            continue
        expected = torch.stack([cosine(first[i], second[j]) for j in others]).nanmean(0)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)


def test_other_query_values_meet_every_other_query_where_draws_suffice() -> None:
    first, second = randn(5, 2, 3, 4), randn(5, 2, 3, 4, seed=1)
    generator = torch.Generator().manual_seed(0)
    met = other_query_values(lambda who: cosine(first, second[who]), 5, 4, generator)
    torch.testing.assert_close(met, other_query_cosines(first, second), rtol=0, atol=1e-12)
    many = other_query_values(lambda who: cosine(first, second[who]), 5, 3, generator)
    assert not torch.allclose(many, met)  # three random ones of four


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_random_cosines_are_those_of_random_vectors(d: int) -> None:
    """Mean 0 and variance 1 / d for one draw, and the same distribution as of vectors drawn for it."""
    from scipy import stats

    like = torch.zeros(20, 30, 10, dtype=F64)
    like[0] = torch.nan
    found = random_cosines(torch.tensor([[[d]]]), like, 1, torch.Generator().manual_seed(d))
    assert found[0].isnan().all()
    drawn = found[1:].flatten().numpy()
    n = len(drawn)
    assert abs(drawn.mean()) < 4 / np.sqrt(d * n)
    spread = np.sqrt(max(3 / (d * (d + 2)) - 1 / d**2, 1e-30))  # of the squared cosine
    assert abs((drawn**2).mean() - 1 / d) < 4 * spread / np.sqrt(n) + 1e-12
    vectors = randn(n, d, seed=1)
    if d > 1:
        assert stats.ks_2samp(drawn, (vectors[:, 0] / vectors.norm(dim=-1)).numpy()).pvalue > 1e-3
    averaged = random_cosines(torch.tensor([[[d]]]), like, 16, torch.Generator().manual_seed(0))[1:]
    assert float(averaged.square().mean()) == pytest.approx(1 / (16 * d), rel=0.1)


# ---- what rows read -------------------------------------------------------------------------------------------------


def test_overlap_and_cosine_of_spectra_are_those_of_the_matrices() -> None:
    a = Factors(randn(3, 2, 8, 11), randn(3, 2, 11, 6, seed=1))
    b = Factors(randn(3, 2, 8, 4, seed=2), randn(3, 2, 4, 6, seed=3))
    first, second = spectrum(a), spectrum(b)
    angles = principal_angles(a, b, k=3)
    for found, side in zip(overlap(first, second, k=3), (angles.left, angles.right), strict=True):
        torch.testing.assert_close(found, side.cos().square().mean(-1))
    torch.testing.assert_close(first.cosine_with(b, norm=second.norm), frobenius_cosine(a, b))
    assert all(side.isnan().all() for side in overlap(first, second, k=5))  # b has rank 4
    pad = torch.nn.functional.pad
    padded = spectrum(Factors(pad(b.left, (0, 3)), pad(b.right, (0, 0, 0, 3))))
    torch.testing.assert_close(padded.effective_rank, second.effective_rank)
    for side, expected in zip(overlap(first, padded.leading(3), k=3), overlap(first, second, k=3), strict=True):
        torch.testing.assert_close(side, expected)


@pytest.mark.parametrize("n_src", [3, 5, 40])
def test_float32_factors_have_the_spectrum_of_the_same_numbers_in_float64(n_src: int) -> None:
    """Eigenvalues in float64 lose half the digits, of which float32 has fewer; ranks and subspaces are the same."""
    # singular values over four orders of magnitude
    scales = torch.logspace(0, -4, n_src, dtype=F64)
    coarse = Factors((randn(7, 2, 16, n_src) * scales).float(), randn(7, 2, n_src, 12, seed=1).float())
    fine = Factors(coarse.left.double(), coarse.right.double())
    found, expected = spectrum(coarse), spectrum(fine)
    bound = 4 * torch.finfo(F64).eps ** 0.5 * expected.values[..., :1]
    assert ((found.values - expected.values).abs() <= bound).all()
    torch.testing.assert_close(found.effective_rank, expected.effective_rank, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.norm, expected.norm)
    other = spectrum(Factors(randn(7, 2, 16, 4, seed=2), randn(7, 2, 4, 12, seed=3)))
    for side, exact in zip(overlap(found, other, k=2), overlap(expected, other, k=2), strict=True):
        torch.testing.assert_close(side, exact, rtol=1e-6, atol=1e-9)
    assert torch.equal(found.rank, torch.full_like(found.rank, min(n_src, 12)))


def test_output_coordinates_have_the_lengths_and_angles_of_the_residual_stream() -> None:
    model = wrap(shared(NAME, F64))
    info = model.info
    a, b = (randn(5, info.n_layers, info.n_heads, info.d_head, seed=s) for s in (0, 1))
    space = OutputSpace(model)
    inner = (space.coordinates(a) * space.coordinates(b)).sum(-1)
    expected = (through_w_o(model, a) * through_w_o(model, b)).sum(-1)
    torch.testing.assert_close(inner, expected, rtol=1e-10, atol=1e-12)


@cache
def update() -> WeightUpdate:
    return finetune(shared(NAME, F64), PROMPTS[0], lr=1.0, keep_factors=True, progress=False)


def test_behind_moved_labels_only_the_in_context_run_changes() -> None:
    """What does not see the demonstrations is taken from the set's own runs; running it again gives the same."""
    model = wrap(shared(NAME, F64))
    space, own = OutputSpace(model), [tokenized(model.host, p) for p in PROMPTS]
    moved = [tokenized(model.host, flip_labels(p, seed=0)) for p in PROMPTS]
    context = Context(Convention.DEFAULT, torch.Generator().manual_seed(0), 1, {}, model.info.d_model, 2)
    variants = [
        Variant("reused", space, moved, update(), settings=("icl",)),
        Variant("again", space, moved, update()),
    ]
    found = measure_set(Variant("", space, own, update()), variants, context, trained=None, choices=None, batch_size=2)
    for statistic in found.statistics:
        reused, again = statistic.nulls["reused"], statistic.nulls["again"]
        torch.testing.assert_close(reused, again, rtol=0, atol=1e-4, equal_nan=True)
    (total,) = (s for s in found.statistics if s.name == "z total")
    assert not torch.allclose(total.nulls["again"], total.values, atol=1e-3)


def test_recorded_runs_answer_as_passes_of_their_own_do() -> None:
    """Labels of one token are read off the runs that are recorded anyway."""
    model = wrap(shared(NAME, F64))
    (group,) = group_sets(model, PROMPTS, prepend_bos=None)
    words = label_words(PROMPTS, ("w32", "w36", "w60"))
    assert words is not None
    choices = Choices.of(model, group, words, scoring="mean")
    assert choices.asked == (32, 36, 60)
    rows = [2, 0]
    keep = Keep(logits=choices.asked)
    for setting in ("icl", "zs", "ft"):
        runs = record(model, [group.tokenized[i] for i in rows], settings=(setting,), update=update(), keep=keep)
        recorded = choices.recorded([r[setting] for r in runs], rows)
        with update().applied(model) if setting == "ft" else nullcontext():
            alone = choices.answers(model, runs[0][setting].prefix, rows)
        assert torch.equal(recorded.best, alone.best)
        assert torch.equal(recorded.label_rank, alone.label_rank)
        torch.testing.assert_close(recorded.candidate_mass, alone.candidate_mass, rtol=1e-6, atol=0)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_names_are_identifiers_and_every_null_says_what_it_asks() -> None:
    names = [row.name for row in STATISTICS]
    assert len(set(names)) == len(names)
    for row in STATISTICS:
        assert row.nulls, row.name
        assert set(row.nulls) <= set(NULLS)
        assert row.description
        assert row.undefined


@cache
def found() -> Comparison:
    return compare(shared(NAME, F64), PROMPTS, update(), measures=Measures(subspace_dim=2), progress=False)


def test_a_statistic_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the norm of the finetuning update over that of the in-context one."""
    row = Statistic(
        name="ratio",
        description="|z^FT - z^ZS| / |z^ICL - z^ZS|",
        level="head",
        unit="query",
        undefined="nothing changed",
        read=lambda batch: (batch.change("ft", "zs").norm(dim=-1), batch.change("icl", "zs").norm(dim=-1)),
        value=lambda norms, _: norms[0] / norms[1],
        nulls={"random": lambda norms, _: torch.ones_like(norms[0])},
    )
    monkeypatch.setattr(measuring, "STATISTICS", (*STATISTICS, row))
    with_it = compare(shared(NAME, F64), PROMPTS, update(), measures=Measures(subspace_dim=2), progress=False)
    torch.testing.assert_close(with_it["ratio"].values, with_it.norms["ft"] / with_it.norms["icl"], rtol=1e-4, atol=0)
    assert {"random", "shuffled labels", "flipped labels"} <= set(with_it["ratio"].nulls)
    assert "ratio" in set(with_it.summary()["statistic"])
    torch.testing.assert_close(with_it["z total"].values, found()["z total"].values)


def test_results_are_compared_by_identity() -> None:
    """0.1 raised, or compared tensors."""
    for value in (found(), found()["z total"], found().answers["ICL"], Controls(), STATISTICS[0]):
        assert value == value
        assert isinstance(hash(value), int)
        assert value != dataclasses.replace(value)


def test_the_flipped_right_answer_is_that_of_the_prompts_that_were_run() -> None:
    names = found().settings["candidates"]
    expected = [names.index(flip_labels(p, seed=0).label) for p in PROMPTS]
    assert found().flipped_gold is not None
    assert found().flipped_gold.tolist() == expected  # type: ignore[union-attr]


def test_tables_are_made_once_and_cannot_be_spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    once = dataclasses.replace(found())
    table = once.summary()
    table["value"] = 0.0
    monkeypatch.setattr(type(once), "statistic_interval", None)  # nothing is computed again
    again: Any = once.summary()
    assert again["value"].abs().max() > 0
    repr(once)
