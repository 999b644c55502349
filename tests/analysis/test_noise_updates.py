"""Updates of Gaussian noise through the real comparison: nothing is called more often than the nominal rate."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from hosts import shared

from metaopt_lens import ICLPrompt
from metaopt_lens.analysis import Comparison, Controls, Measures, compare, findings, headline
from metaopt_lens.experiments._join import join_comparisons
from metaopt_lens.finetuning import WeightUpdate, finetune

NAME = "bridge:gpt2"
N_SETS = 60
LABELS = ("w32", "w36")
TESTED = ("z total", "z direct", "linear", "matrices", "subspaces left", "subspaces right", "SimAOU unnormalised")


def _prompts(index: int) -> list[ICLPrompt]:
    rng = torch.Generator().manual_seed(index)
    words = (torch.randperm(56, generator=rng)[:10] + 40).tolist()
    demos = [(f"w{word}", LABELS[i % 2]) for i, word in enumerate(words[:4])]
    return [ICLPrompt(demos, f"w{word}", label=LABELS[i % 2]) for i, word in enumerate(words[4:])]


def _noise(like: WeightUpdate, seed: int) -> WeightUpdate:
    rng = torch.Generator().manual_seed(seed)
    changed: dict[str, Any] = {}
    for name, tensor in like.tensors().items():
        drawn = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
        changed[name] = (drawn * tensor.double().norm() / drawn.norm()).to(tensor.dtype)
    return dataclasses.replace(like, settings=None, factors=None, losses=(), **changed)


@cache
def noise_comparisons() -> tuple[Comparison, ...]:
    """One a set, each with noise of its own, of the norm of what finetuning makes."""
    model = shared(NAME)
    found = []
    for index in range(N_SETS):
        prompts = _prompts(index)
        like = finetune(model, prompts[0], lr=0.5, progress=False)
        noise = _noise(like, 1000 + index)
        assert abs(noise.norm() / like.norm() - 1) < 1e-5
        found.append(
            compare(
                model,
                prompts,
                noise,
                controls=dataclasses.replace(Controls.of("quick"), n_null_draws=4),
                measures=Measures(subspace_dim=2),
                progress=False,
            )
        )
    return tuple(found)


def groups(n_sets: int) -> list[Comparison]:
    parts = noise_comparisons()
    return [join_comparisons(parts[i : i + n_sets]) for i in range(0, N_SETS, n_sets)]


def test_with_one_or_two_sets_nothing_is_called_and_counts_are_undefined() -> None:
    for n_sets in (1, 2):
        for found in groups(n_sets)[:5]:
            summary = found.summary()
            assert summary[["significant", "of"]].isna().all(axis=None)
            assert found.to_frame()[["p", "p_adjusted"]].isna().all(axis=None)
    for found in groups(1)[:5]:
        assert {f.answer for f in findings(found)} == {"undecided"}
        assert headline(findings(found)).startswith("Undecided: there is one demonstration set")
        frame = found.to_frame().set_index("statistic")
        assert frame.loc["matrices", ["low", "high"]].isna().all(axis=None)  # one value a set: no interval


def test_with_three_or_six_sets_no_more_than_the_nominal_rate_is_called() -> None:
    """Benjamini-Hochberg at 5 %: of the comparisons, at most 5 % (plus 3.3 standard errors) call any head or layer.

    A random subspace as null would call "subspaces right" in most: keys of one model resemble each other anyway.
    """
    for n_sets in (3, 6):
        found = groups(n_sets)
        tables = [comparison.to_frame() for comparison in found]
        for name in TESTED:
            rows = [table[table["statistic"] == name] for table in tables]
            called = sum(bool((row["p_adjusted"] < 0.05).any()) for row in rows)
            assert called <= 0.05 * len(rows) + 3.3 * (0.05 * 0.95 * len(rows)) ** 0.5, (n_sets, name)
            p = [float(x) for row in rows for x in row["p"]]
            assert len(p) == len(rows) * (3 if name.startswith("Sim") else 12)
            # heads of one comparison are not independent: the error is that of as many tests as comparisons
            low = sum(x < 0.05 for x in p) / len(p)
            assert low <= 0.05 + 3.3 * (0.05 * 0.95 / len(rows)) ** 0.5, (n_sets, name)
        summary = found[0].summary().set_index("statistic")
        assert summary.loc["z total", "of"] == 12
