"""What the report shows of one run: the verdict with its figure first, then sections that open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis import (
    PARTS,
    Comparison,
    Finding,
    Measured,
    findings,
    headline,
    not_beyond,
    null_of,
    outcome,
    part_name,
)
from metaopt_lens.analysis._further_questions import FURTHER, further_questions
from metaopt_lens.analysis._verdict import Outcome
from metaopt_lens.experiments import ExperimentResult, published_numbers
from metaopt_lens.viz._chosen_heads import N_STRONGEST
from metaopt_lens.viz._comparison_figures import depth_profile
from metaopt_lens.viz._comparison_page import comparison_context
from metaopt_lens.viz._interval_chart import Row, interval_chart
from metaopt_lens.viz._report_attribution import attribution_context
from metaopt_lens.viz._report_more import patch_context, profile_context
from metaopt_lens.viz._sceptic_figures import algebra_figure, ceiling_figure, ladder_figure, order_figure
from metaopt_lens.viz._views import attention_view, token_view

RULES = {"gd": "ordinary gradient descent", "lcgd": "layer-causal gradient descent"}
SIMILARITY = "z total"
_IN_WORDS: dict[Outcome, str] = {
    "one set": "undecided: one set",
    "not interpreted": "not interpreted",
    "opposite": "opposite",
    "not shown": "not shown",
    "no control": "alike; no control",
    "beyond all": "alike, beyond all controls",
    "not beyond all": "alike, not beyond",
}
COLOURS: dict[Outcome, str] = {
    "one set": "undecided",
    "not interpreted": "undecided",
    "opposite": "no",
    "not shown": "unclear",
    "no control": "unclear",
    "beyond all": "yes",
    "not beyond all": "unclear",
}
_SETTINGS = {"ZS": "zero-shot", "FT": "finetuned", "ICL": "in context"}
_IN_PARTS = {"contrast": "which label (contrast)", "format": "any label (format)", "rest": "the rest of output space"}


def run_name(run: ExperimentResult) -> str:
    """Model, task, shots, and the label words where they are not the natural ones.

    Args:
        run: a run.
    """
    return ", ".join(part for part in (f"{model_of(run)} on {run.task.name}", _shots(run), label_words(run)) if part)


def _shots(run: ExperimentResult) -> str:
    return f"{run.config.shots} shot{'' if run.config.shots == 1 else 's'}"


def label_words(run: ExperimentResult) -> str:
    """Which label words the demonstrations show; empty for the natural ones.

    Args:
        run: a run.
    """
    return "" if run.config.labels == "natural" else f"{run.config.labels} labels"


def model_of(run: ExperimentResult) -> str:
    """The model as it was asked for; of a path the last part.

    Args:
        run: a run.
    """
    return Path(run.config.model).name


def verdict_words(answers: Sequence[Finding]) -> str:
    """What the findings come to, in as few words as fit a cell.

    Args:
        answers: of `findings`.
    """
    found = outcome(answers)
    if found != "not beyond all":
        return _IN_WORDS[found]
    return f"{_IN_WORDS[found]} {len(not_beyond(answers))} of {sum(f.control is not None for f in answers)} controls"


def run_context(run: ExperimentResult, number: int) -> dict[str, Any]:
    """What ``report_run.html.j2`` shows.

    Args:
        run: a finished run.
        number: of the run on the page; names of figures start with it.
    """
    config = run.config
    newest = {**(run.provenance[-1] if run.provenance else {}), **run.model}
    return {
        "name": run_name(run),
        "id": f"run-{number}",
        "config": config,
        "facts": _facts(run),
        "comparisons": [_comparison(run, rule) for rule in config.rules],
        "attribution": attribution_context(run) if "attributions" in run.table_names else None,
        "profile": profile_context(run),
        "patch": patch_context(run),
        "example": _example(run),
        "following": _following(run),
        "model": f"{model_of(run)} ({run.model.get('architecture', '')}, {config.dtype})",
        "task": run.task.name,
        "learning_rate": _learning_rate(run),
        "rules": [RULES[rule] for rule in config.rules],
        "source": str(run.data.get("source", config.data or "hub")),
        "notes": run.notes,
        "version": newest.get("versions", {}).get("metaopt-lens", "of an unknown version"),
        "provenance": {k: _short(v) for k, v in newest.items() if not isinstance(v, list | dict)},
    }


def _facts(run: ExperimentResult) -> dict[str, str]:
    """Which model, task, demonstrations, finetuning and cost: what the first screen says next to the verdict."""
    config, model = run.config, run.model
    sizes = "" if "n_layers" not in model else f", {model['n_layers']} layers × {model['n_heads']} heads"
    seconds = sum(piece.get("seconds", 0.0) for log in run.provenance for piece in log["pieces"].values())
    newest = run.provenance[-1] if run.provenance else {}
    where = newest.get("device", "cpu").upper()
    asked = len(run.comparison(config.rules[0]).sets) // len(run.seeds)
    return {
        "model": f"{model_of(run)}{sizes}",
        "task": ", ".join(part for part in (run.task.name, label_words(run)) if part),
        "demonstrations": f"{_shots(run)} × {len(run.seeds)} sets",
        "queries": f"{asked} behind each set",
        "finetuning": ", ".join(RULES[rule] for rule in config.rules),
        "learning rate": _learning_rate(run),
        "cost": f"{_duration(seconds)} on {where}, {str(newest.get('ended') or newest.get('started') or '')[:10]}",
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _learning_rate(run: ExperimentResult) -> str:
    """The rate that was given, or those that were chosen, over rules and sets."""
    if run.config.lr != "auto":
        return f"{run.config.lr:g}"
    chosen = {run.finetuning(rule, seed)["lr"] for rule in run.config.rules for seed in run.seeds}
    return f"{', '.join(f'{rate:g}' for rate in sorted(chosen))} (chosen on held-out rows)"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:28] + "…" + text[-28:]


# ---- the comparison under one rule -----------------------------------------------------------------------------------


def _comparison(run: ExperimentResult, rule: Literal["gd", "lcgd"]) -> dict[str, Any]:
    found = run.comparison(rule)
    answers = findings(found)
    return comparison_context(found) | {
        "key": rule,
        "rule": RULES[rule],
        "headline": headline(answers),
        "words": verdict_words(answers),
        "colour": COLOURS[outcome(answers)],
        "charts": [similarity_chart(found, answers), accuracy_chart(found)],
        "findings": answers,
        "beyond_text": _beyond(answers),
        "controls": _controls(run, rule, found),
        "depth": depth_profile(found, SIMILARITY),
        "parts": _parts_chart(found),
        "standing_out": _standing_out(found),
        "further": _further(found),
        "published": _published(run, rule, found),
    }


def _beyond(answers: tuple[Finding, ...]) -> str:
    """How many controls the similarity exceeds."""
    n = sum(f.control is not None for f in answers)
    return f"the similarity is shown to exceed {n - len(not_beyond(answers))} of {n} nulls"


def similarity_chart(found: Comparison, answers: tuple[Finding, ...]) -> dict[str, Any]:
    """The similarity of the updates and every null that asks a question.

    Args:
        found: the comparison.
        answers: of `findings`.
    """
    measured = found[SIMILARITY]
    said = {f.control: f.answer for f in answers if f.control is not None}
    rows = [_row(found, measured, None, "similarity", kind="value")]
    for name in measured.nulls:
        if null_of(name).question:
            rows.append(_row(found, measured, name, name, about=said.get(name, "")))
    title = "How alike are the in-context and the finetuning update?"
    unit = "similarity (mean cosine over heads) and, in grey, its nulls, with 95 % intervals"
    return interval_chart(title, unit, rows, about="exceeded?", reference=(0.0, "0"))


def accuracy_chart(found: Comparison) -> dict[str, Any]:
    """Accuracy zero-shot, finetuned and in context.

    Args:
        found: the comparison.
    """
    nan = float("nan")
    try:
        table = {row["quantity"]: row for row in found.accuracies().to_dict("records")}
    except UndefinedMetricError:
        table = {}
    rows = []
    for key, name in _SETTINGS.items():
        row = table.get(f"accuracy {key}", {"value": nan, "low": nan, "high": nan})
        rows.append(Row(name, row["value"], row["low"], row["high"], "null" if key == "ZS" else "value"))
    line = None if rows[0].value != rows[0].value else (rows[0].value, "zero-shot")
    unit = "accuracy, with 95 % intervals; the line is zero-shot"
    return interval_chart("Is anything learned?", unit, rows, percent=True, reference=line)


def _parts_chart(found: Comparison) -> dict[str, Any] | None:
    """The similarity in each part of output space, next to its first null."""
    names = {s.name for s in found.statistics}
    rows: list[Row] = []
    for part in PARTS:
        if part_name(SIMILARITY, part) not in names:
            return None
        measured = found[part_name(SIMILARITY, part)]
        rows.append(_row(found, measured, None, _IN_PARTS[part], kind="value"))
        rows.append(_row(found, measured, measured.main_null, f"null: {measured.main_null}"))
    unit = "mean cosine over heads, with 95 % intervals"
    return interval_chart("Format or contrast?", unit, rows, reference=(0.0, "0"))


def _row(
    found: Comparison,
    measured: Measured,
    null: str | None,
    name: str,
    *,
    kind: Literal["value", "null"] = "null",
    about: str = "",
) -> Row:
    values = measured.values if null is None else measured.nulls[null]
    mean = found.statistic_interval(measured, values.nanmean((1, 2)), level=0.95)
    return Row(name, float(mean.estimate), float(mean.low), float(mean.high), kind, about)


def _standing_out(found: Comparison) -> str:
    """How many heads differ from their null, in a few words."""
    row = next(r for r in found.summary().to_dict("records") if r["statistic"] == SIMILARITY)
    if pd.isna(row["significant"]):
        return "single heads cannot be tested with fewer than three sets"
    return f"{row['significant']} of {row['of']} heads stand out from their null ({row['main_null']})"


def _controls(run: ExperimentResult, rule: str, comparison: Comparison) -> pd.DataFrame:
    """The controls that were run: what it would mean if one were high or low, where it is from, and what it took."""
    took: dict[str, float] = {}
    for log in run.provenance:
        for piece, about in log["pieces"].items():
            if piece.endswith(f"/{rule}"):
                for name, seconds in about.get("controls", {}).items():
                    took[name] = took.get(name, 0.0) + seconds
    rows = [
        {
            "control": name,
            "if it is as high as the similarity": null_of(name).high,
            "if it is low": null_of(name).low,
            "proposed in": null_of(name).source or "–",
            "seconds": f"{took[name]:.1f}" if name in took else "as uphill" if "uphill" in name else "no further runs",
        }
        for name in dict.fromkeys(null for statistic in comparison.statistics for null in statistic.nulls)
    ]
    together = f"{took[FURTHER]:.1f} for all questions" if FURTHER in took else "–"
    rows += [
        {
            "control": question.key,
            "if it is as high as the similarity": question.high,
            "if it is low": question.low,
            "proposed in": question.source,
            "seconds": together,
        }
        for question in ([] if comparison.further is None else further_questions(comparison.further))
    ]
    return pd.DataFrame(rows)


def _further(comparison: Comparison) -> list[tuple[go.Figure, str]]:
    """A figure and its caption for each of the sceptic's further results."""
    found = comparison.further
    if found is None:
        return []
    figures = {
        "What any change of the values could do, and what finetuning does": found.ceiling
        and ceiling_figure(found.ceiling),
        "Which optimiser's step explains the in-context update": found.ladder and ladder_figure(found.ladder),
        "What the order of the demonstrations changes": found.order and order_figure(found.order),
        "Demonstrations alone, in company and in sum": found.algebra and algebra_figure(found.algebra),
    }
    return [(_for_the_page(figure), title) for title, figure in figures.items() if figure is not None]


def _for_the_page(figure: go.Figure) -> go.Figure:
    """Without the title, which the caption says, and with the legend above."""
    return figure.update_layout(
        title=None, height=330, margin={"t": 40, "b": 50}, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )


def _published(run: ExperimentResult, rule: str, comparison: Comparison) -> pd.DataFrame | None:
    numbers = published_numbers(run.config.model, run.task.name, rule)
    if not numbers:
        return None
    own = {row["quantity"]: 100 * row["value"] for row in comparison.accuracies().to_dict("records")}
    own["Rec2FTP"] = comparison.rec2ftp().value
    own |= {row["statistic"]: row["value"] for row in comparison.summary().to_dict("records")}
    return pd.DataFrame(
        {"quantity": n.quantity, "published": n.value, "here": own.get(n.quantity), "source": n.source} for n in numbers
    )


# ---- labels and words ------------------------------------------------------------------------------------------------


def _following(run: ExperimentResult) -> dict[str, Any] | None:
    found = run.label_following()
    return None if found is None else {"plot": found.plot(), "table": found.to_frame(), "notes": found.notes}


def _example(run: ExperimentResult) -> dict[str, Any] | None:
    """circuitsvis views of the strongest heads on the first prompt: those that the table of effects names first."""
    example = run.example()
    if example is None:
        return None
    if "attributions" in run.table_names:
        table = run.table("attributions")
        table = table[table["metric"] == table["metric"].iloc[0]]
        heads = table.sort_values("rank", kind="stable")["name"].head(N_STRONGEST).tolist()
        why = "The four heads with the largest measured effect"
    else:
        heads = [str(ref) for ref in example.heads(N_STRONGEST)]
        why = "The four heads with the largest meta-gradient in the residual stream (no effects were measured)"
    return {
        "why": why,
        "heads": heads,
        "attention": attention_view(example, heads).html,
        "shares": token_view(example, heads).html,
    }
