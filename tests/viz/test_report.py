"""The report says what the stored numbers say, for one run and for several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
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
