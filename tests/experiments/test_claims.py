"""Published claims on tables with planted numbers, on a run, a sweep and exported tables; the command ``claims``."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.cli import app
from metaopt_lens.cli._experiment_commands import run as run_of_command_line
from metaopt_lens.experiments import CLAIMS, Claim, RunConfig, SweepResult, claims_of, evaluate_claims
from metaopt_lens.experiments._claim_page import ClaimBlock
from metaopt_lens.experiments._claim_table import Cell, Difference, Of
from metaopt_lens.experiments._run_command import WITH_OPTION, run_command
from metaopt_lens.viz import claims_text

RUN = {"model": "m", "task": "t", "shots": 8, "lr": "auto", "labels": "natural"}
ONE = Claim("one", "A is above B.", "nobody", Difference(Of("A"), Of("B")), "A less B", "--a")


def planted(
    values: dict[str, Sequence[float]], findings: dict[str, str] | None = None, rule: str = "gd"
) -> Callable[[str], pd.DataFrame]:
    """Tables of one run; a quantity's name may have its null behind a bar."""
    rows = [
        {**RUN, "rule": rule, "set": s, "quantity": name.partition("|")[0], "null": name.partition("|")[2], "value": v}
        for name, numbers in values.items()
        for s, v in enumerate(numbers)
    ]
    means = pd.DataFrame(rows).assign(excess=float("nan"))
    asked = [{**RUN, "rule": rule, "key": key, "answer": answer} for key, answer in (findings or {}).items()]
    tables = {"set_means": means, "findings": pd.DataFrame(asked)} if asked else {"set_means": means}

    def table(name: str) -> pd.DataFrame:
        if name not in tables:
            raise OptionError(f"there is no table {name!r}")
        return tables[name]

    return table


def verdict(tables: Callable[[str], pd.DataFrame], claim: Claim = ONE) -> pd.Series:
    return evaluate_claims(tables, [claim]).iloc[0]


@pytest.mark.parametrize(
    ("a", "expected"),
    [((0.5, 0.6, 0.7), "holds"), ((-0.5, -0.6, -0.7), "does not hold"), ((-0.5, 0.1, 0.7), "undecided")],
)
def test_the_t_interval_over_sets_decides(a: Sequence[float], expected: str) -> None:
    b = (0.1, 0.0, 0.2)
    found = verdict(planted({"A": a, "B": b}))
    low, high = stats.t.interval(0.95, 2, np.mean(np.subtract(a, b)), stats.sem(np.subtract(a, b)))
    np.testing.assert_allclose((found["low"], found["high"]), (low, high), atol=1e-12)
    assert (found["verdict"], found["n_sets"]) == (expected, 3)
    assert found["value"] - found["null"] == pytest.approx(found["estimate"])


def test_an_interval_ends_where_the_number_cannot_go() -> None:
    found = verdict(planted({"A": (1.0, 0.0, 0.5), "B": (0.0, 0.0, 0.0)}), dataclasses.replace(ONE, bounds=(-1.0, 1.0)))
    assert stats.t.interval(0.95, 2, 0.5, stats.sem([1.0, 0.0, 0.5]))[1] > 1  # so wide are three sets
    assert (found["verdict"], found["high"]) == ("undecided", 1.0)
    assert -1 < found["low"] < 0


def test_two_sets_decide_nothing_however_clear() -> None:
    found = verdict(planted({"A": (5.0, 5.001), "B": (0.0, 0.0)}))
    assert found["low"] > 4
    assert found["verdict"] == "undecided"
    assert found["because"] == "it is defined behind 2 demonstration sets, and 3 are needed (--seeds)"


def test_equal_values_have_no_interval_and_decide_nothing() -> None:
    found = verdict(planted({"A": (1.0, 1.0, 1.0), "B": (0.0, 0.0, 0.0)}))
    assert (found["verdict"], found["because"]) == ("undecided", "there is no interval")


def test_a_similarity_is_read_only_where_learning_and_finetuning_are_shown() -> None:
    values = {"A": (0.5, 0.6, 0.7), "B": (0.1, 0.0, 0.2)}
    claim = dataclasses.replace(ONE, similarity=True)
    shown = planted(values, {"in_context_learning": "yes", "finetuning": "yes"})
    assert verdict(shown, claim)["verdict"] == "holds"
    not_shown = verdict(planted(values, {"in_context_learning": "yes", "finetuning": "unclear"}), claim)
    assert (not_shown["verdict"], not_shown["because"]) == ("undecided", "it is not shown that finetuning helps")
    assert not_shown["estimate"] == verdict(shown, claim)["estimate"]


def test_comparable_needs_something_to_be_compared_with() -> None:
    claim = dataclasses.replace(ONE, reads=Difference(Of("A", "permuted"), Of("A"), 0.5, positive=Of("A")))
    clear = (0.40, 0.41, 0.42)
    assert verdict(planted({"A": clear, "A|permuted": (0.39, 0.40, 0.43)}), claim)["verdict"] == "holds"
    assert verdict(planted({"A": clear, "A|permuted": (0.01, 0.02, 0.0)}), claim)["verdict"] == "does not hold"
    nothing = verdict(planted({"A": (-0.1, 0.1, 0.0), "A|permuted": (0.39, 0.40, 0.43)}), claim)
    assert "there is no similarity to reach" in nothing["because"]


def test_what_a_run_lacks_is_said_with_the_option_that_makes_it() -> None:
    there, absent = ONE, dataclasses.replace(ONE, key="two", reads=Difference(Of("A"), Of("C")), needs="--controls x")
    found = evaluate_claims(planted({"A": (1, 2, 3), "B": (0, 0, 1)}), [there, absent]).set_index("claim")
    assert found.loc["two", "verdict"] == "lacking"
    assert found.loc["two", "because"] == "the run has not made it: --controls x"
    assert found.loc["one", "verdict"] != "lacking"
    with pytest.raises(OptionError, match=r"no claim can be evaluated: .* Run again with one of --controls x"):
        evaluate_claims(planted({"A": (1, 2, 3)}), [absent])


def test_a_cell_is_the_last_row_that_starts_so() -> None:
    rows = [("in context", 0.9), ("static patch, 2 queries", 0.1), ("static patch, 12 queries", 0.5)]
    patch = [{**RUN, "setting": s, "sets": 3, "gain": g, "gain_low": g - 0.2, "gain_high": g + 0.2} for s, g in rows]
    means = planted({"A": (1, 2, 3)})
    tables = {"patch": pd.DataFrame(patch), "set_means": means("set_means")}
    claim = dataclasses.replace(ONE, reads=Cell("patch", (("setting", "static patch"),), "gain"))
    found = verdict(lambda name: tables[name], claim)
    assert (found["verdict"], found["estimate"]) == ("holds", 0.5)
    assert found["low"] == pytest.approx(0.3)


def test_every_row_has_a_name_a_source_and_an_option() -> None:
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.source.startswith("arXiv:"), claim.key
        flag, _, _ = claim.needs.partition(" ")
        assert not flag.startswith("--") or flag[2:].replace("-", "_") in WITH_OPTION, claim.key


def test_claims_agree_with_the_findings_of_the_run(small_sweep: SweepResult) -> None:
    found = claims_of([small_sweep.path])
    assert set(found["task"]) == {"synthetic", "synthetic-3"}
    assert found.groupby("task")["claim"].nunique().to_dict() == {t: len(CLAIMS) for t in ("synthetic", "synthetic-3")}
    answers = {"yes": "holds", "no": "does not hold", "unclear": "undecided", "undecided": "undecided"}
    for name, run in small_sweep.runs.items():
        own = found[found["task"] == run.config.task].set_index("claim")
        asked = run.table("findings").set_index("key")
        for claim, key in (
            ("learns", "in_context_learning"),
            ("finetunes", "finetuning"),
            ("uphill", "control:uphill"),
        ):
            assert own.loc[claim, "verdict"] == answers[asked.loc[key, "answer"]], name
            assert own.loc[claim, "estimate"] == asked.loc[key, "estimate"]
        assert own.loc["untrained", "because"] == "the run has not made it: --random-weights"
        assert own.loc["learns", "command"] == run_command(run.config)


def test_exported_tables_and_single_runs_say_the_same(small_sweep: SweepResult, tmp_path: Path) -> None:
    small_sweep.export(tmp_path / "data")
    columns = ["task", "claim", "verdict", "because", "command", "date", "version"]
    whole = claims_of([small_sweep.path])
    exported = claims_of([tmp_path / "data"])
    assert exported[columns].equals(whole[columns])
    np.testing.assert_allclose(exported["estimate"], whole["estimate"], rtol=1e-4, atol=1e-5)
    single = claims_of([run.path for run in small_sweep.runs.values()])
    assert single[columns].equals(whole[columns])


def _call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["claims", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_prints_and_writes_the_table(small_sweep: SweepResult, tmp_path: Path) -> None:
    one = next(iter(small_sweep.runs.values()))
    done = _call(small_sweep.path, "--out", tmp_path / "c.md")
    assert done.exit_code == 0, done.output
    assert "needs --random-weights" in done.output
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert all(claim.text in text for claim in CLAIMS)
    assert f"`{run_command(one.config)}`" in text
    done = _call(one.path, "--out", tmp_path / "c.csv")
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "c.csv")) == len(CLAIMS)
    assert "--out must end in .csv or .md" in _call(one.path, "--out", tmp_path / "c.txt").output


def test_many_tasks_are_listed_in_tables_that_fit_the_terminal() -> None:
    tasks, cell = tuple(f"task-{i}" for i in range(9)), "holds +0.417 [+0.21, +0.624]"
    block = ClaimBlock("a model", tasks, ((ONE, tuple(f"{i}: {cell}" for i in range(9))),), ())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(claims_text(block, console.width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if line.startswith("claim")] == [
        ["claim", *tasks[start : start + 2]] for start in range(0, 9, 2)
    ]
    assert sum(line.startswith("a model") for line in lines) == 5
    assert all(sum(f"{i}: holds" in line for line in lines) == 1 for i in range(9))


def test_a_directory_without_a_run_or_an_unfinished_one(small_sweep: SweepResult, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds no run: give a directory that `metaopt-lens run` or `sweep`"):
        claims_of([tmp_path])
    one = next(iter(small_sweep.runs.values()))
    shutil.copytree(one.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pieces" / "tables")
    with pytest.raises(OptionError, match=r"no run in .* is finished: give the same command again to resume it"):
        claims_of([tmp_path / "run"])


def test_versions_are_not_mixed_unless_asked(small_sweep: SweepResult, tmp_path: Path) -> None:
    one = next(iter(small_sweep.runs.values()))
    shutil.copytree(one.path, tmp_path / "old")
    for file in (tmp_path / "old" / "provenance").glob("*.json"):
        body = json.loads(file.read_text(encoding="utf-8"))
        body["versions"]["metaopt-lens"] = "0.0.9"
        file.write_text(json.dumps(body), encoding="utf-8")
    with pytest.raises(
        OptionError, match=r"made by different versions of metaopt-lens \(.*0\.0\.9: .*old\).*--mixed-v"
    ):
        claims_of([one.path, tmp_path / "old"])
    found = claims_of([one.path, tmp_path / "old"], mixed_versions=True)
    assert found.groupby("directory")["version"].first()[str(tmp_path / "old")] == "0.0.9"
    assert _call(one.path, tmp_path / "old", "--mixed-versions").output.count("gradient descent, /") == 2


def test_a_runs_command_says_every_setting_that_is_not_the_default() -> None:
    assert run_command(RunConfig("tiny", "mr")) == "metaopt-lens run --model tiny --task mr --out DIR"
    config = RunConfig(
        "a b", "mr", seeds=(1, 4), rules=("gd",), attribution=False, unrelated=True, lr=0.1, n_null_draws=2, data="/x"
    )
    assert run_command(config) == (
        "metaopt-lens run --model 'a b' --task mr --seeds 1,4 --lr 0.1 --rules gd --unrelated --no-attribution "
        "--data PATH --config settings.toml --out DIR  # settings.toml: n_null_draws = 2"
    )
    assert run_command(RunConfig("tiny", "mr", seeds=(4,))).endswith("# settings.toml: seeds = [4]")


def test_settings_with_an_option_are_those_of_the_command_line() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig) if not field.metadata.get("place")}
    assert set(inspect.signature(run_of_command_line).parameters) & fields == WITH_OPTION
