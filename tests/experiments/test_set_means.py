"""The tables `set_means` and `findings` of a run: intervals made of the one are those of the other."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from metaopt_lens.experiments import SweepResult


def test_t_intervals_over_a_runs_set_means_are_those_of_its_findings(small_sweep: SweepResult) -> None:
    for run in small_sweep.runs.values():
        means, findings = run.table("set_means"), run.table("findings").set_index("key")
        assert set(means["set"]) == {0, 1, 2}
        checked = 0
        for key, found in findings.iterrows():
            control = str(key).removeprefix("control:")
            statistic = "z total: contrast" if control == "shuffled labels" else "z total"
            own = means[(means["quantity"] == statistic) & (means["null"] == control)]
            if own.empty:
                continue
            low, high = stats.t.interval(0.95, 2, own["excess"].mean(), stats.sem(own["excess"]))
            np.testing.assert_allclose((found["low"], found["high"]), (low, high), atol=1e-6)
            checked += 1
        assert checked == 7
        gain = means.pivot_table(index="set", columns="quantity", values="value")
        learned = gain["accuracy ICL"] - gain["accuracy ZS"]
        assert learned.mean() == pytest.approx(findings.loc["in_context_learning", "estimate"])


def test_set_means_average_to_the_summary_and_count_as_the_predictions(small_sweep: SweepResult) -> None:
    run = next(iter(small_sweep.runs.values()))
    means, summary = run.table("set_means"), run.table("summary").set_index("statistic")
    for name, row in summary.iterrows():
        own = means[means["quantity"] == name]
        assert own[own["null"] == ""]["value"].mean() == pytest.approx(row["value"], abs=1e-6)
        for null in set(own["null"]) - {""}:
            assert own[own["null"] == null]["value"].mean() == pytest.approx(row[f"null: {null}"], abs=1e-6)
    answers = run.table("predictions")
    for seed, own in answers.groupby("seed"):
        wrong = own[own["zs"] != own["label"]]
        corrected = wrong[wrong["ft"] == wrong["label"]]
        found = means[(means["quantity"] == "Rec2FTP %") & (means["set"] == seed)].set_index("null")["value"]
        assert found["base rate"] == pytest.approx(100 * (wrong["icl"] == wrong["label"]).mean())
        if len(corrected):
            assert found[""] == pytest.approx(100 * (corrected["icl"] == corrected["label"]).mean())
        else:
            assert np.isnan(found[""])
