"""The report says what the stored numbers say, for one run and for several."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import SMALL
from shown import cards
from typer.testing import CliRunner

from metaopt_lens import load_tiny
from metaopt_lens._errors import OptionError
from metaopt_lens.analysis import findings, headline, outcome
from metaopt_lens.cli import app
from metaopt_lens.experiments import ExperimentResult, SweepResult, published_numbers, run_experiment
from metaopt_lens.experiments._join import join_comparisons
from metaopt_lens.viz import write_report


def test_verdict_methods_and_tables(run: ExperimentResult, tmp_path: Path) -> None:
    written = write_report([run], tmp_path / "report.html")
    html = written["page"].read_text(encoding="utf-8")
    assert headline(findings(run.comparison("gd"))) in html
    assert "arXiv:2212.10559" in html
    assert "Methods" in html
    assert "learning rate 0.02" in html
    assert "http://" not in html.split("<main>")[1].split("</main>")[0]
    assert str(tmp_path) not in html
    for name in run.table_names:
        stored = pd.read_csv(written[name])
        assert len(stored) == len(run.table(name))


def test_the_heads_drawn_are_those_the_table_of_effects_names_first(run: ExperimentResult, tmp_path: Path) -> None:
    html = write_report([run], tmp_path / "report.html")["page"].read_text(encoding="utf-8")
    table = run.table("attributions")
    gain = run.table("attribution_seeds")["gain"].mean()
    effects = table["exact"] * (1 if gain > 0 else -1)
    assert effects.is_monotonic_decreasing
    expected = table["name"].tolist()[:4]
    example = run.example()
    assert example is not None
    assert expected != [str(ref) for ref in example.heads(4)]  # else this could not tell the orders apart
    assert [card.head for card in cards(html)] == expected * 2
    shown = html.split("<h3>Heads by effect</h3>")[1].split("</table>")[0]
    assert re.findall(r">(L\dH\d)<", shown)[:4] == expected


def test_recovery_of_single_queries_is_undefined_and_said_in_words(run: ExperimentResult, tmp_path: Path) -> None:
    """`SMALL` measures effects on one query a seed: no held-out query, no interval of an effect over one set."""
    html = write_report([run], tmp_path / "report.html")["page"].read_text(encoding="utf-8")
    assert "is not defined for a single query" in html
    assert "heads_for_90_percent" not in html
    assert "Heads that recover 90 % of the in-context gain" in html
    seeds = run.table("attribution_seeds")
    assert seeds[["heads_needed", "heads_low", "heads_high"]].isna().all().all()


def test_columns_are_named_by_words(run: ExperimentResult, tmp_path: Path) -> None:
    """No heading of the page is a raw column name; the CSV files keep theirs."""
    written = write_report([run], tmp_path / "report.html")
    headings = re.findall(r"<th>(.*?)</th>", written["page"].read_text(encoding="utf-8"))
    assert "value from" in headings  # of the stored table `summary`
    assert [heading for heading in headings if "_" in heading] == []
    assert "value_low" in pd.read_csv(written["summary"]).columns


def test_the_first_screen_says_what_the_tables_say(run: ExperimentResult, tmp_path: Path) -> None:
    """Similarity and nulls, accuracies, model, task, sets: from the stored tables, without the page's own code."""
    html = write_report([run], tmp_path / "report.html")["page"].read_text(encoding="utf-8")
    first = html.split('<section class="ml-first">')[1].split("</section>")[0]
    rows = {cells[0]: cells[2:] for cells in _rows(first)}
    (total,) = run.table("summary").query("statistic == 'z total'").to_dict("records")
    assert rows["similarity"][0] == (
        f"{total['value']:+.3f} {total['value_low']:+.3f} to {total['value_high']:+.3f}".replace("-", "−")
    )
    answers = {f.control: f.answer for f in findings(run.comparison("gd")) if f.control is not None}
    assert set(answers) < set(rows)
    for name, answer in answers.items():
        assert rows[name][0].split()[0] == f"{total[f'null: {name}']:+.3f}".replace("-", "−")
        assert rows[name][1] == answer
    accuracies = run.table("accuracies").set_index("quantity")["value"]
    for name, key in (("zero-shot", "ZS"), ("finetuned", "FT"), ("in context", "ICL")):
        assert rows[name][0].startswith(f"{100 * accuracies[f'accuracy {key}']:.0f} %")
    for fact in ("tiny, 3 layers × 4 heads", "synthetic-2", "4 shots × 2 sets", "3 behind each set", "0.02"):
        assert f"<dd>{fact}</dd>" in first


def _rows(html: str) -> list[list[str]]:
    """Texts of the cells of every row of every chart."""
    rows = re.findall(r"<tr class=\"ml-(?:value|null)\">(.*?)</tr>", html, re.DOTALL)
    return [
        [" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]


def test_several_runs_lead_with_a_matrix(run: ExperimentResult, tmp_path: Path) -> None:
    """Models by tasks; with finetuning not shown to help, runs are listed and their similarity is not given."""
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, model="another"))
    assert outcome(findings(run.comparison("gd"))) == "not interpreted"
    written = write_report([run, run, other], tmp_path / "all.html")
    html = written["page"].read_text(encoding="utf-8")
    matrix = html.split('<table class="ml-matrix">')[1].split("</table>")[0]
    models = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', matrix, re.DOTALL)
    assert [name for name, _ in models] == ["tiny", "another"]
    assert [cells.count("not interpreted") for _, cells in models] == [2, 1]
    assert re.findall(r'href="#(run-\d)"', matrix) == ["run-0", "run-1", "run-2"]
    assert all(html.count(f'id="run-{number}"') == 1 for number in range(3))
    assert "ml-dot" not in matrix
    assert "both shown to work in 0 of 3 comparisons" in html
    listed = html.split("<h3>Not interpreted</h3>")[1].split("</table>")[0]
    assert listed.count("it is not shown that") == 3
    assert (tmp_path / "all-tables" / "1-summary.csv").is_file()


def test_a_run_that_works_shows_its_similarity_in_the_matrix(run: ExperimentResult, tmp_path: Path) -> None:
    """With predictions as they would be if both learned, a cell says what the updates show, with its interval."""
    sets = []
    for seed in run.seeds:
        found = run.comparison("gd", seed)
        gold, _ = found.predictions()
        right_once = torch.where(torch.arange(len(gold)) < seed, gold, 1 - gold)
        sets.append(dataclasses.replace(found, zs=right_once, icl=gold, ft=gold))
    works = join_comparisons(sets * 3)
    told = dataclasses.replace(run)
    told._joined["gd"] = works
    answers = findings(works)
    same_way = next(f for f in answers if f.key == "direction")
    assert [f.answer for f in answers[:2]] == ["yes", "yes"]
    html = write_report([told, run], tmp_path / "both.html")["page"].read_text(encoding="utf-8")
    matrix = html.split('<table class="ml-matrix">')[1].split("</table>")[0]
    assert "both shown to work in 1 of 2 comparisons" in html
    shown = f"{same_way.estimate:+.3f} ({same_way.low:+.3f} to {same_way.high:+.3f})".replace("-", "−")
    assert f"<span>{shown}</span>" in matrix
    assert matrix.count("ml-dot") == 1
    assert matrix.count("not interpreted") == 1


def test_head_profile_and_patch_have_their_sections(run: ExperimentResult, tmp_path: Path) -> None:
    """Where a run has them: every head's scores, and the accuracy with one patch for all queries next to zero-shot."""
    plain = write_report([run], tmp_path / "plain.html")["page"].read_text(encoding="utf-8")
    assert "Head profile" not in plain
    assert "Context as weights" not in plain
    config = dataclasses.replace(SMALL, queries=6, attribution_queries=4, profile=True, patch=True, attribution=False)
    more = run_experiment(config, tmp_path / "run", model=load_tiny(), progress=False)
    html = write_report([more], tmp_path / "more.html")["page"].read_text(encoding="utf-8")
    scores = html.split('aria-label="Scores of all heads"')[1].split("</table>")[0]
    assert set(re.findall(r">(L\dH\d)<", scores)) == set(more.table("profile")["name"])
    section = html.split("Context as weights: one patch for all queries")[1].split("</details>")[0]
    rows = {cells[0]: cells[2] for cells in _rows(section)}
    table = more.table("patch").set_index("setting")["accuracy"]
    assert set(rows) == set(table.index)
    for name, value in table.items():
        assert rows[name].startswith(f"{100 * value:.0f} %")


def test_unfinished_run_is_refused(run: ExperimentResult, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "pieces" / "tables")
    unfinished = dataclasses.replace(run, path=copy)
    with pytest.raises(OptionError, match="not finished: run it again"):
        write_report([unfinished], tmp_path / "report.html")
    with pytest.raises(OptionError, match="at least one run"):
        write_report([], tmp_path / "report.html")


def test_report_command(run: ExperimentResult, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run.path), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.html").is_file()
    assert f"tables as CSV in {tmp_path / 'r-tables'}" in done.output
    assert (tmp_path / "r-tables").is_dir()
    for wrong in (tmp_path / "nothing", tmp_path / "r.html"):  # a file is not a damaged run
        failed = CliRunner().invoke(app, ["report", str(wrong)])
        assert failed.exit_code == 2
        assert f"error: {wrong} holds no run" in failed.output


def test_report_command_on_a_sweep_shows_its_runs(small_sweep: SweepResult, tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    done = CliRunner().invoke(app, ["report", str(small_sweep.path), "--out", str(page)])
    assert done.exit_code == 0, done.output
    own = write_report(list(small_sweep.runs.values()), tmp_path / "own.html")["page"]
    assert page.read_text(encoding="utf-8") == own.read_text(encoding="utf-8")


def test_published_numbers_are_found_by_model_and_task() -> None:
    found = {
        n.quantity: n.value for n in published_numbers("org/fairseq-dense-1.3B", "sst2", "gd") if "Dai" in n.source
    }
    assert found["Rec2FTP"] == 91.84
    assert found["accuracy ICL"] == 92.7
    critique = {n.quantity: n.value for n in published_numbers("org/fairseq-dense-1.3B", "cb", "lcgd")}
    assert critique["SimAM difference"] == 0.38
    assert published_numbers("gpt2", "sst2", "gd") == []
    assert published_numbers("org/fairseq-dense-1.3B", "synthetic", "gd") == []


def test_the_longer_list_goes_down_the_matrix_and_flipped_runs_are_named(run: ExperimentResult, tmp_path: Path) -> None:
    """Three tasks of one model are three rows; a run with flipped labels says so in its cell, heading and title."""
    names = ["one", "two", "three"]
    tasks = [dataclasses.replace(run, task=dataclasses.replace(run.task, name=name)) for name in names]
    html = write_report(tasks, tmp_path / "tasks.html")["page"].read_text(encoding="utf-8")
    matrix = html.split('<table class="ml-matrix">')[1].split("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', matrix) == names
    assert re.findall(r'<th scope="col">(.*?)</th>', matrix) == ["task", "tiny"]
    assert "4 demonstrations in every run" in matrix
    assert "4 shots" not in matrix
    config = dataclasses.replace(SMALL, labels="flipped", attribution=False)
    flipped = run_experiment(config, tmp_path / "flipped", model=load_tiny(), progress=False)
    both = write_report([run, flipped], tmp_path / "both.html")["page"].read_text(encoding="utf-8")
    assert "<h2>tiny on synthetic-2, 4 shots, flipped labels</h2>" in both
    assert "<small>flipped labels, lr 0.02</small>" in both


def test_a_chosen_learning_rate_is_told_by_its_number(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, lr="auto", held_out=2, attribution=False)
    found = run_experiment(config, tmp_path / "auto", model=load_tiny(), progress=False)
    chosen = sorted({choice.lr for seed in found.seeds if (choice := found.learning_rate("gd", seed)) is not None})
    html = write_report([found], tmp_path / "auto.html")["page"].read_text(encoding="utf-8")
    assert f"<dd>{', '.join(f'{rate:g}' for rate in chosen)} (chosen on held-out rows)</dd>" in html
