"""What is no larger than rounding is undefined and counted; shares carry their counts and an exact interval."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import shared
from scipy import stats

from metaopt_lens import ICLPrompt, MetaoptLensError
from metaopt_lens.analysis import (
    Comparison,
    Controls,
    Convention,
    Measures,
    compare,
    cosine,
    difference,
    exact_interval,
    rec2ftp,
    sim_am,
    sim_aou,
)
from metaopt_lens.finetuning import WeightUpdate, finetune

DEMOS = [("w30 w31", "w32"), ("w34", "w36"), ("w38 w39", "w32"), ("w42", "w36")]
PROMPTS = [ICLPrompt(DEMOS, query, label=label) for query, label in (("w16 w17", "w36"), ("w19 w20", "w32"))]
QUICK = dataclasses.replace(Controls.of("quick"), n_null_draws=1)
FAST: dict[str, Any] = {"progress": False, "controls": QUICK, "measures": Measures(subspace_dim=2)}


def update_of(name: str, dtype: torch.dtype) -> WeightUpdate:
    return finetune(shared(name, dtype), PROMPTS[0], lr=1.0, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_difference_of_attention_maps_is_undefined_in_layer_0_of_models_with_relative_positions(
    dtype: torch.dtype,
) -> None:
    """There the query's scores do not depend on the demonstrations: 0.1 gave a cosine of rounding errors."""
    found = compare(shared("bridge:llama", dtype), PROMPTS, update_of("bridge:llama", dtype), **FAST)
    statistic = found["SimAM difference"]
    assert statistic.values[:, 0].isnan().all()
    assert statistic.values[:, 1:].isfinite().all()
    frame = found.to_frame()
    rows = frame[frame["statistic"] == "SimAM difference"].set_index("layer")
    assert rows["undefined"].tolist() == [2, 0, 0]
    assert rows.loc[0, ["value", "low", "excess", "p"]].isna().all()
    summary = found.summary().set_index("statistic")
    assert summary.loc["SimAM difference", ["undefined", "values"]].tolist() == [2, 6]
    defined = statistic.values[:, 1:].double().mean()
    assert summary.loc["SimAM difference", "value"] == pytest.approx(float(defined), abs=1e-6)
    assert not found["z total"].values.isnan().any()


def test_an_update_of_the_size_of_rounding_has_no_direction() -> None:
    name = "bridge:gpt2"
    for factor, undefined in ((1e-7, True), (1.0, False)):
        found = compare(shared(name), PROMPTS, factor * update_of(name, torch.float32), **FAST)
        for statistic in ("z total", "z direct", "linear", "matrices", "SimAOU", "SimAOU unnormalised"):
            assert bool(found[statistic].values.isnan().all()) is undefined, statistic
        assert not found["SimAM ICL-ZS"].values.isnan().any()  # says nothing about the update


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_counts_from_a_thousand_rounding_units_on(dtype: torch.dtype) -> None:
    base = torch.ones(3, 4, dtype=dtype)
    step = torch.tensor([[100.0], [4000.0], [1e5]], dtype=dtype) * torch.finfo(dtype).eps * torch.eye(4, dtype=dtype)[0]
    found = difference(base + step, base)
    assert found.isnan().all(-1).tolist() == [True, False, False]  # 50, 2,000 and 50,000 units of the norm, which is 2
    half = difference(base + step, base, eps=torch.finfo(torch.bfloat16).eps)  # in half precision: from 1/32 on
    assert half.isnan().all()
    assert not difference(base * 1.04, base, eps=torch.finfo(torch.bfloat16).eps).isnan().any()


def test_the_published_conventions_count_what_is_undefined_by_default() -> None:
    generator = torch.Generator().manual_seed(0)
    zs, ft = (torch.randn(5, 2, 8, generator=generator) for _ in range(2))
    icl = zs * (1 + 1e-7)
    assert sim_aou(icl, zs, ft).plain.values.isnan().all()
    assert sim_aou(icl, zs, ft, convention=Convention.PUBLISHED).plain.values.isfinite().all()
    maps = [m[:, :, None] for m in (icl, ft, zs)]
    assert sim_am(maps[0], maps[1], baseline=maps[2]).per_head.values.isnan().all()
    raw = sim_am(maps[0], maps[1], baseline=maps[2], convention=Convention.PUBLISHED).per_head.values
    torch.testing.assert_close(raw[:, :, 0], cosine(icl.double() - zs.double(), ft.double() - zs.double()))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 1), (3, 7), (7, 7), (50, 120)])
def test_exact_intervals_invert_the_binomial_test(k: int, n: int) -> None:
    found = exact_interval(k, n)
    assert found is not None
    low, high = (x / 100 for x in found)
    assert stats.binom.sf(k - 1, n, low) == pytest.approx(0.025 if k else 1)
    assert stats.binom.cdf(k, n, high) == pytest.approx(0.025 if k < n else 1)
    assert low <= k / n <= high


def test_exact_intervals_cover_at_least_at_their_rate() -> None:
    for p in (0.05, 0.3, 0.9):
        n = 12
        intervals = [exact_interval(k, n) or (0.0, 0.0) for k in range(n + 1)]
        covered = sum(stats.binom.pmf(k, n, p) for k, (low, high) in enumerate(intervals) if low <= 100 * p <= high)
        assert covered >= 0.95


def test_recall_carries_its_counts_base_rate_and_interval() -> None:
    zs = torch.tensor([False, False, False, True])
    recall = rec2ftp(zs, torch.tensor([True, False, False, True]), torch.tensor([True, False, False, True]))
    assert recall.interval() == pytest.approx((2.5, 100.0))
    assert recall.text == ("100.0 % (1 of 1; 2.5 % to 100.0 %); base rate 33.3 % (1 of 3; 0.8 % to 90.6 %)")
    nothing = rec2ftp(~zs[3:], zs[:1], zs[:1])
    assert nothing.interval() is None
    assert nothing.text.startswith("undefined (finetuning corrected none")
    assert exact_interval(0, 0) is None


def test_comparisons_of_version_0_1_are_refused(tmp_path: Path) -> None:
    found = compare(shared("bridge:gpt2"), PROMPTS, update_of("bridge:gpt2", torch.float32), **FAST)
    path = found.save(tmp_path / "comparison")
    assert Comparison.load(path).n_sets == 1
    body = json.loads(path.read_text())
    for statistic in body["statistics"]:
        statistic["nulls"] = ["shuffled" if n == "other query" else n for n in statistic["nulls"]]
    path.write_text(json.dumps(body))
    with pytest.raises(MetaoptLensError, match=r"was written by metaopt-lens 0.1, whose null 'shuffled' is not what"):
        Comparison.load(path)


def test_repr_makes_no_interval() -> None:
    found = compare(shared("bridge:gpt2"), PROMPTS, update_of("bridge:gpt2", torch.float32), **FAST)
    assert "[" not in repr(found)
    assert "intervals conditional on these demonstrations: see summary()" in repr(found)


def test_a_control_cannot_take_the_name_of_another_null() -> None:
    update = update_of("bridge:gpt2", torch.float32)
    with pytest.raises(MetaoptLensError, match="the control 'random' has the name of another null"):
        compare(shared("bridge:gpt2"), PROMPTS, update, **FAST | {"controls": Controls(updates={"random": update})})
