"""The report says what the stored numbers say, for one run and for several."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest
from shown import cards
from typer.testing import CliRunner

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis import findings, headline
from metaopt_lens.cli import app
from metaopt_lens.experiments import ExperimentResult, published_numbers
from metaopt_lens.viz import write_report


def test_verdict_methods_and_tables(run: ExperimentResult, tmp_path: Path) -> None:
    written = write_report([run], tmp_path / "report.html")
    html = written["page"].read_text(encoding="utf-8")
    assert headline(findings(run.comparison("gd"))) in html
    assert "arXiv:2212.10559" in html
    assert "Methods" in html
    assert "learning rate 0.02" in html
    assert "http://" not in html.split("<main>")[1]
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


def test_several_runs_are_compared(run: ExperimentResult, tmp_path: Path) -> None:
    written = write_report([run, run], tmp_path / "both.html")
    html = written["page"].read_text(encoding="utf-8")
    assert "All runs" in html
    assert (tmp_path / "both-tables" / "1-summary.csv").is_file()


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
    failed = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert failed.exit_code == 2
    assert "holds no run" in failed.output


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
