"""Findings say yes or no only where the data can, and the headline is no stronger than they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import pytest
import torch

from metaopt_lens import load_tiny
from metaopt_lens.analysis import Comparison, Finding, Measured, findings, headline
from metaopt_lens.models import ModelInfo, wrap

PER_SET = 4


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return wrap(load_tiny()).info


def planted(
    info: ModelInfo,
    n_sets: int,
    *,
    value: float = 0.5,
    nulls: dict[str, float] | None = None,
    icl: float = 1.0,
    ft: float = 1.0,
    gold: bool = True,
) -> Comparison:
    """A comparison with a similarity around `value`, and shares of right answers; zero-shot about half is right."""
    rng = torch.Generator().manual_seed(0)
    n = n_sets * PER_SET

    def around(mean: float) -> torch.Tensor:
        return mean + 0.05 * torch.randn(n, 3, 4, generator=rng)

    def answers(share: float) -> torch.Tensor:
        return (torch.rand(n, generator=rng) < share).long()

    named = {"other query": 0.0, **(nulls or {})}
    statistics = (
        Measured("z total", "", "head", "query", around(value), {k: around(v) for k, v in named.items()}),
        Measured("SimAOU", "", "layer", "query", around(0.4), {"analytic": around(0.3)}),
    )
    right = torch.ones(n, dtype=torch.int64)
    return Comparison(
        model=info,
        statistics=statistics,
        sets=torch.arange(n_sets).repeat_interleave(PER_SET),
        norms={},
        gold=right if gold else -right,
        zs=answers(0.4),
        icl=answers(icl),
        ft=answers(ft),
        flipped_gold=None,
        controlled={},
        n_demos=(8,) * n_sets,
        settings={},
        provenance={},
    )


def by_key(answers: Sequence[Finding]) -> dict[str, Finding]:
    return {f.key: f for f in answers}


def test_every_null_has_a_finding_whatever_its_name(info: ModelInfo) -> None:
    """0.1 asked only about controls whose name begins with 'unrelated'."""
    comparison = planted(info, 8, nulls={"my own text": 0.45, "unrelated text": 0.0, "flipped labels": 0.1})
    found = findings(comparison)
    assert comparison.findings() == found
    assert [f.control for f in found if f.control] == ["other query", "my own text", "unrelated text", "flipped labels"]
    assert [f.key for f in found][:3] == ["in_context_learning", "finetuning", "direction"]
    assert "the control “my own text”" in by_key(found)["control:my own text"].question
    assert len({f.key for f in found}) == len(found)


def test_beyond_every_control_means_every_control(info: ModelInfo) -> None:
    beyond = headline(findings(planted(info, 8, nulls={"my own text": 0.0})))
    assert "beyond every control that was run (over 8 demonstration sets)" in beyond
    assert "does not prove one" in beyond
    equal = findings(planted(info, 8, nulls={"my own text": 0.5}))
    assert by_key(equal)["control:my own text"].answer != "yes"
    assert "beyond every control" not in headline(equal)
    assert "over 1 of 2 controls (my own text) no excess is shown" in headline(equal)
    assert "no evidence" in headline(equal)


def test_headline_is_no_stronger_than_the_findings(info: ModelInfo) -> None:
    found = findings(planted(info, 6, nulls={"my own text": 0.0}))

    def with_answer(answer: Literal["yes", "no", "unclear", "undecided"]) -> str:
        return headline(tuple(dataclasses.replace(f, answer=answer) if f.key == "direction" else f for f in found))

    assert "does not prove one" in with_answer("yes")
    assert "opposite directions" in with_answer("no")
    assert "No common direction" in with_answer("unclear")
    assert "No common direction" in with_answer("undecided")


def test_one_set_decides_nothing(info: ModelInfo) -> None:
    found = findings(planted(info, 1))
    assert {f.answer for f in found} == {"undecided"}
    assert all("there is one demonstration set" in f.sentence for f in found)
    assert all("conditional on these demonstrations" in f.sentence for f in found if f.low == f.low)
    assert headline(found).startswith("Undecided: there is one demonstration set")


def test_every_yes_and_no_names_the_number_of_sets(info: ModelInfo) -> None:
    found = findings(planted(info, 6))
    assert {f.answer for f in found} == {"yes"}
    for finding in found:
        assert finding.sentence.startswith("Yes: ")
        assert finding.sentence.endswith("over 6 demonstration sets).")
    opposite = by_key(findings(planted(info, 6, value=-0.5)))
    assert opposite["direction"].answer == "no"
    assert opposite["direction"].sentence.startswith("No, the opposite: ")
    assert "over 6 demonstration sets" in headline(tuple(opposite.values()))


@pytest.mark.parametrize(
    ("shares", "failed", "sentence"),
    [
        ({"icl": 0.4}, "in_context_learning", "It is not shown that the model learns in context (over 6"),
        ({"ft": 0.4}, "finetuning", "It is not shown that finetuning helps (over 6"),
    ],
)
def test_similarity_is_not_interpreted_where_learning_is_not_shown(
    info: ModelInfo, shares: dict[str, float], failed: str, sentence: str
) -> None:
    found = findings(planted(info, 6, **shares))  # type: ignore[arg-type]
    assert by_key(found)[failed].answer in ("no", "unclear")
    for finding in found[2:]:
        assert finding.answer == "undecided"
        assert finding.sentence.startswith("Undecided, as it is not shown that ")
    assert headline(found).startswith(sentence)


def test_without_gold_labels_it_is_not_shown_that_anything_is_learned(info: ModelInfo) -> None:
    found = findings(planted(info, 6, gold=False))
    assert {f.answer for f in found} == {"undecided"}
    assert found[0].sentence == "Undecided, as query 0 has no gold label."
    assert headline(found).startswith("It is not shown that the model learns in context, nor that finetuning helps")


def test_an_interval_that_there_is_none_of_is_not_printed(info: ModelInfo) -> None:
    """The same gain in every set: 0.1 printed an interval of width 0 and said yes."""
    found = planted(info, 6)
    same = Comparison(**{**vars(found), "zs": torch.zeros(24, dtype=torch.int64), "icl": found.gold})
    finding = findings(same)[0]
    assert finding.answer == "unclear"  # 4 of 4 queries: p = 0.12
    assert "is +1.000 (the same in every set, so there is no interval;" in finding.sentence


@pytest.mark.parametrize(("wrong", "answer"), [(5, "unclear"), (6, "yes")])
def test_a_model_that_is_always_right_learns(info: ModelInfo, wrong: int, answer: str) -> None:
    """All sets agree exactly, so there is no interval; 5 of 5 gained has p = 2 / 2^5 > 0.05, 6 of 6 p = 2 / 2^6."""
    n_sets, per_set = 3, 8
    base = planted(info, n_sets * per_set // PER_SET)
    n = n_sets * per_set
    before = (torch.arange(n) % per_set >= wrong).long()  # the same queries behind every set
    always = dataclasses.replace(
        base,
        sets=torch.arange(n_sets).repeat_interleave(per_set),
        zs=before,
        icl=torch.ones(n).long(),
        n_demos=(8,) * 3,
    )
    found = by_key(findings(always))["in_context_learning"]
    assert found.answer == answer
    assert f"exact sign test on one set's queries, p = {2 / 2**wrong:.2g}" in found.sentence
    assert "over 3 demonstration sets" in found.sentence
