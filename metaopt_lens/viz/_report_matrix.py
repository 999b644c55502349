"""What a report of several runs shows first: models by tasks, a verdict in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metaopt_lens.analysis import Comparison, findings, not_working, outcome
from metaopt_lens.analysis._verdict import DIRECTION
from metaopt_lens.experiments import ExperimentResult
from metaopt_lens.viz._interval_chart import Row, interval_chart
from metaopt_lens.viz._report_run import COLOURS, RULES, accuracy_chart, label_words, model_of, run_name, verdict_words


def matrix_context(runs: Sequence[ExperimentResult]) -> dict[str, Any]:
    """What ``report_matrix.html.j2`` shows.

    Args:
        runs: finished runs, in the order of the page.
    """
    models = list(dict.fromkeys(model_of(run) for run in runs))
    tasks = list(dict.fromkeys(run.task.name for run in runs))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for rule in run.config.rules:
            entry = _entry(run, number, run.comparison(rule)) | {"rule": RULES[rule]}
            cells.setdefault((model_of(run), run.task.name), []).append(entry)
    entries = [entry for cell in cells.values() for entry in cell]
    # The longer of the two lists goes down the page, which scrolls that way.
    down, across = (models, tasks) if len(models) >= len(tasks) else (tasks, models)
    rows = [
        (name, [cells.get((name, other) if down is models else (other, name), []) for other in across]) for name in down
    ]
    shots = {run.config.shots for run in runs}
    chart = interval_chart("", "", [entry["similarity"] for entry in entries], reference=(0.0, "0"))
    for entry, drawn in zip(entries, chart["rows"], strict=True):
        entry["drawn"] = drawn
    return {
        "line": chart["line"],
        "ends": (chart["ticks"][0][1], chart["ticks"][-1][1]),
        "corner": "model" if down is models else "task",
        "columns": across,
        "rows": rows,
        "shots": shots.pop() if len(shots) == 1 else None,
        "sentence": _sentence(entries),
        "left_out": [entry for entry in entries if entry["outcome"] in ("not interpreted", "one set")],
        "rules": len({entry["rule"] for entry in entries}) > 1,
    }


def _entry(run: ExperimentResult, number: int, found: Comparison) -> dict[str, Any]:
    answers = findings(found)
    same_way = next(f for f in answers if f.key == DIRECTION)
    rate = "" if run.config.lr == "auto" else f"lr {run.config.lr:g}"
    decided = outcome(answers)
    return {
        "name": run_name(run),
        "link": f"run-{number}",
        "shots": f"{run.config.shots} shots",
        "settings": [setting for setting in (label_words(run), rate) if setting],
        "outcome": decided,
        "words": verdict_words(answers),
        "colour": COLOURS[decided],
        "similarity": Row("", same_way.estimate, same_way.low, same_way.high, "value"),
        "why": "one demonstration set cannot decide"
        if decided == "one set"
        else f"it is not shown that {', nor that '.join(not_working(answers))}",
        "accuracies": accuracy_chart(found)["rows"],
    }


def _sentence(entries: Sequence[dict[str, Any]]) -> str:
    """How many comparisons can be read, and what those say."""
    read = [entry["outcome"] for entry in entries if entry["outcome"] not in ("not interpreted", "one set")]
    counts = {
        "alike beyond every control that was run": read.count("beyond all"),
        "alike, but not beyond every control": read.count("not beyond all"),
        "alike, and no control was run": read.count("no control"),
        "not shown to be alike": read.count("not shown"),
        "opposite": read.count("opposite"),
    }
    lead = (
        f"In-context learning and finetuning are both shown to work in {len(read)} of {len(entries)} comparisons; only "
        "there the similarity is interpreted"
    )
    found = [(what, count) for what, count in counts.items() if count]
    parts = [f"in {count} {'they' if nth else 'the updates'} are {what}" for nth, (what, count) in enumerate(found)]
    return f"{lead}: {'; '.join(parts)}." if parts else f"{lead}."
