"""Pictures and pages of comparisons, effects and reports hold the numbers they are made from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from metaopt_lens.analysis import Comparison, Finetuning, compare
from metaopt_lens.experiments import episode_prompts
from metaopt_lens.experiments._join import join_comparisons
from metaopt_lens.interventions import head_effects
from metaopt_lens.models.tiny import load_tiny, sample_episodes
from metaopt_lens.viz import (
    comparison_data,
    comparison_map,
    comparison_text,
    depth_profile,
    effects_map,
    write_comparison_outputs,
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    episode = sample_episodes(n=1, n_demos=8, n_categories=2)[0]
    return compare(load_tiny(), episode_prompts(episode)[:5], finetuning=Finetuning(lr=0.02), progress=False)


def test_map_shows_value_null_and_excess(comparison: Comparison) -> None:
    figure = comparison_map(comparison, "z total")
    statistic = comparison["z total"]
    value = statistic.values.nanmean(0).numpy()
    null = statistic.nulls["other query"].nanmean(0).numpy()
    for trace, grid in zip(figure.data, (value, null, value - null), strict=True):
        np.testing.assert_allclose(np.array(trace.z, dtype=float), grid, atol=1e-6)
    assert len({(trace.zmin, trace.zmax) for trace in figure.data}) == 1  # a null as large must look as large


def test_absolute_numbers_stand_by_the_predictions(comparison: Comparison, tmp_path: Path) -> None:
    answers = comparison.answers
    mass = {key: float(own.candidate_mass.sum()) / 5 for key, own in answers.items()}
    assert mass["ICL"] > 0.9 > 0.5 > mass["ZS"]
    expected = (
        f"Total probability of the candidates, mean over queries: {mass['ZS']:.1%} zero-shot, {mass['ICL']:.1%} in "
        f"context, {mass['FT']:.1%} finetuned."
    )
    first = {key: int((own.label_rank == 1).sum()) for key, own in answers.items()}
    html = write_comparison_outputs(comparison, tmp_path)["page"].read_text(encoding="utf-8")
    for sentence in (expected, f"first choice in the whole vocabulary for {first['ZS']} of 5 zero-shot"):
        assert sentence in html
    assert f"have a probability of only {mass['ZS']:.1%} zero-shot" in html
    joined = join_comparisons([comparison, comparison]).answers
    assert joined["ICL"].label_rank.tolist() == answers["ICL"].label_rank.tolist() * 2


def test_effects_map_of_one_query_has_no_curve() -> None:
    episode = sample_episodes(n=1, n_demos=6, n_categories=2)[0]
    figure = effects_map(head_effects(load_tiny(), episode_prompts(episode)[:1]))
    assert len(figure.data) == 2
    assert "undefined" in [annotation.text for annotation in figure.layout.annotations]


def test_curves_show_every_null(comparison: Comparison) -> None:
    figure = comparison_map(comparison, "SimAOU")
    names = [trace.name for trace in figure.data]
    assert names[:2] == ["95 % interval", "value"]
    assert {f"{null} null" for null in comparison["SimAOU"].nulls} <= set(names)
    expected = comparison["SimAOU"].values.nanmean((0, 2)).numpy()
    np.testing.assert_allclose(np.array(figure.data[1].y), expected, atol=1e-6)
    assert "by depth" in str(depth_profile(comparison, "z total").layout.title.text)


def test_terminal_table_fits_eighty_columns(comparison: Comparison) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - closed below
    console.print(comparison_text(comparison))
    console.file.close()
    text = console.export_text()
    assert "…" not in text
    assert "z total, position-matched" in text


def test_outputs_are_complete(comparison: Comparison, tmp_path: Path) -> None:
    written = write_comparison_outputs(comparison, tmp_path)
    data = json.loads(written["data"].read_text(encoding="utf-8"))
    counts = {"both", "ft", "icl", "zs_wrong", "n_queries"}
    assert data["rec2ftp"].keys() == {"value", "interval", "base_rate", "undefined"} | counts
    assert {f["answer"] for f in data["findings"]} == {"undecided"}  # one demonstration set
    assert {row["significant"] for row in data["summary"]} == {None}
    assert {row["statistic"] for row in data["summary"]} == {s.name for s in comparison.statistics}
    html = written["page"].read_text(encoding="utf-8")
    assert "Content-Security-Policy" in html
    assert html.count("ml-map-0") >= 1
    json.dumps(comparison_data(comparison), allow_nan=False)


def test_effects_map_shows_exact_and_estimated_effects() -> None:
    episode = sample_episodes(n=1, n_demos=6, n_categories=2)[0]
    effects = head_effects(load_tiny(), episode_prompts(episode)[:2], metric="logit_difference")
    figure = effects_map(effects)
    np.testing.assert_allclose(np.array(figure.data[0].z), effects.map.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.array(figure.data[1].z), effects.first_order.mean(0).numpy(), atol=1e-6)
    assert figure.data[2].y[-1] == pytest.approx(1.0, abs=1e-4)  # all heads together make the whole gain


def test_plot_of_a_comparison_is_its_map(comparison: Comparison) -> None:
    assert comparison.plot("z direct") == comparison_map(comparison, "z direct")


def test_legend_of_curves_is_lower_than_the_plot(comparison: Comparison) -> None:
    """The plot keeps its height however many nulls there are; what the legend needs is added below."""
    layout = comparison_map(comparison, "SimAOU").layout
    plot = layout.height - layout.margin.t - layout.margin.b
    rows = -(-len(comparison_map(comparison, "SimAOU").data) // 2)
    assert rows >= 3
    assert plot > rows * 20
    assert layout.margin.b >= rows * layout.legend.font.size * 1.5
