"""run --labels: other label words in the demonstrations, and who follows them."""

from __future__ import annotations

import dataclasses
from html import unescape
from pathlib import Path

import pytest
from runs import SMALL

from metaopt_lens import load_tiny
from metaopt_lens._errors import OptionError
from metaopt_lens.analysis import NULLS
from metaopt_lens.analysis._further_questions import FURTHER, further_questions
from metaopt_lens.experiments import ExperimentResult, run_experiment
from metaopt_lens.experiments._prompt_set import make_prompts
from metaopt_lens.models import wrap
from metaopt_lens.tasks import Row, Task, TaskRows
from metaopt_lens.viz import write_report

CONFIG = dataclasses.replace(
    SMALL, labels="flipped", seeds=(0, 1), lr=0.05, rules=("gd",), attribution=False, controls="quick"
)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> ExperimentResult:
    return run_experiment(CONFIG, tmp_path_factory.mktemp("flipped"), model=load_tiny(), progress=False)


def test_flipped_prompts_are_the_natural_ones_with_other_words(flipped: ExperimentResult, tmp_path: Path) -> None:
    natural = run_experiment(
        dataclasses.replace(CONFIG, labels="natural", seeds=(0,)), tmp_path, model=load_tiny(), progress=False
    )
    prompts, own = flipped.prompts(0), natural.prompts(0)
    assert prompts.natural_prompts == own.prompts
    assert own.shown_as == {}
    assert sorted(prompts.shown_as) == sorted(prompts.shown_as.values())
    for prompt, plain in zip(prompts.prompts, own.prompts, strict=True):
        assert prompt.label == prompts.shown_as[str(plain.label)] != plain.label
        assert [d.label for d in prompt.demos] == [prompts.shown_as[d.label] for d in plain.demos]
    assert natural.label_following() is None
    assert "label_following" not in natural.table_names


def test_a_run_with_flipped_labels_says_who_follows_them(flipped: ExperimentResult, tmp_path: Path) -> None:
    table = flipped.table("label_following")
    assert set(table["labels"]) == {"natural", "flipped"}
    assert set(table["learner"]) == {"in context", "SGD", "full-batch", "layer-causal"}
    rows = table.set_index(["labels", "learner", "against"])["accuracy"]
    shown, natural = (float(rows["flipped", "in context", against]) for against in ("shown", "natural"))
    assert shown > 0.5 > natural
    found = flipped.label_following()
    assert found is not None
    assert sorted(set(found.sets.tolist())) == [0, 1]
    page = write_report([flipped], tmp_path / "report.html")["page"].read_text(encoding="utf-8")
    assert "Who follows the demonstrations&#39; label words?" in page or "Who follows the demonstrations' label" in page


def test_open_answers_cannot_be_flipped() -> None:
    rows = TaskRows(*(tuple(Row("apple", "dax", i) for i in range(n)) for n in (20, 4)), source="made")
    with pytest.raises(OptionError, match="task 'open' has open answers, which cannot be flipped: take a task"):
        make_prompts(CONFIG, Task("open"), rows, wrap(load_tiny()), 0)


def test_the_report_says_which_controls_were_run_and_what_they_took(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, labels="natural", seeds=(0,), controls="standard")
    run = run_experiment(config, tmp_path / "run", model=load_tiny(), progress=False)
    (log,) = run.provenance
    took = log["pieces"]["seed-0/gd"]["controls"]
    assert set(took) == {"shuffled labels", "flipped labels", "unrelated text", "uphill"}
    assert all(seconds > 0 for seconds in took.values())
    assert "controls" not in log["pieces"]["seed-0/prompts"]
    page = write_report([run], tmp_path / "report.html")["page"].read_text(encoding="utf-8")
    for name, seconds in took.items():
        assert NULLS[name].high in page
        assert NULLS[name].low in page
        assert f"{seconds:.1f}" in page
    assert "Is it about descending at all?" in page
    assert "arXiv:2602.21204" in page


def test_the_report_draws_the_sceptics_further_results(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, labels="natural", seeds=(0, 1), controls="sceptic", random_weights=False)
    run = run_experiment(config, tmp_path / "run", model=load_tiny(), progress=False)
    further = run.comparison("gd").further
    assert further is not None
    page = write_report([run], tmp_path / "report.html")["page"].read_text(encoding="utf-8")
    page = unescape(page)
    asked = further_questions(further)
    assert len(asked) == 4
    for question in asked:
        for text in (question.text, question.high, question.low, question.source):
            assert text in page
    took = sum(log["pieces"][f"seed-{seed}/gd"]["controls"][FURTHER] for log in run.provenance for seed in (0, 1))
    assert f"{took:.1f} for all questions" in page
    for title in (
        "What any change of the values could do",
        "Which optimiser",
        "What the order",
        "Demonstrations alone",
    ):
        assert f"<figcaption>{title}" in page


def test_every_null_says_what_it_would_mean() -> None:
    for name, null in NULLS.items():
        assert null.what, name
        assert null.high, name
        assert null.low, name
        assert null.high != null.low
