"""The report of one or several runs: one HTML page that can be read and sent, and every table as CSV."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from metaopt_lens._errors import OptionError
from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens.analysis import Comparison, findings, headline, null_of
from metaopt_lens.analysis._further_questions import FURTHER, further_questions
from metaopt_lens.experiments import ExperimentResult, published_numbers
from metaopt_lens.viz._chosen_heads import N_STRONGEST
from metaopt_lens.viz._comparison_figures import comparison_map
from metaopt_lens.viz._comparison_page import comparison_context
from metaopt_lens.viz._effects_map import heat_map
from metaopt_lens.viz._render import render, words
from metaopt_lens.viz._sceptic_figures import algebra_figure, ceiling_figure, ladder_figure, order_figure
from metaopt_lens.viz._views import attention_view, token_view

_RULES = {"gd": "ordinary gradient descent", "lcgd": "layer-causal gradient descent"}
_CITATIONS = (
    "Dai, D., Sun, Y., Dong, L., Hao, Y., Ma, S., Sui, Z., Wei, F. (2023). Why Can GPT Learn In-Context? Language "
    "Models Secretly Perform Gradient Descent as Meta-Optimizers. Findings of ACL 2023. arXiv:2212.10559.",
    "Deutch, G., Magar, N., Bar Natan, T., Dar, G. (2024). In-context Learning and Gradient Descent Revisited. NAACL "
    "2024. arXiv:2311.07772.",
    "Nanda, N., Bloom, J. (2022). TransformerLens.",
)
_ROWS_SHOWN, _HEADS_SHOWN = 500, 40
_HEAD_TITLES = {
    "rank": "rank",
    "name": "head",
    "exact": "effect",
    "low": "from",
    "high": "to",
    "first_order": "first-order estimate",
    "metric": "metric",
}
_SEED_TITLES = {
    "seed": "seed",
    "metric": "metric",
    "queries": "queries",
    "in_context": "in context",
    "zero_shot": "zero-shot",
    "gain": "gain",
    "heads_needed": "heads for 90 %",
    "heads_low": "from",
    "heads_high": "to",
    "heads": "which",
    "first_order_correlation": "correlation of estimate and effect",
    "note": "interval",
}


def write_report(
    runs: Sequence[ExperimentResult], path: str | os.PathLike[str], *, title: str | None = None
) -> dict[str, Path]:
    """Write the page and the tables; several runs are compared first, then shown one after the other.

    The page carries everything it needs, its own policy blocks every request, and it prints well.

    Args:
        runs: finished runs.
        path: the HTML file; tables go to a folder of the same name with ``-tables`` instead of the ending.
        title: heading of the page; by default it names the run.

    Returns:
        Paths by name: ``page`` and one entry per table.

    Raises:
        OptionError: no runs, or one that is not finished.
    """
    if not runs:
        raise OptionError("a report needs at least one run.")
    for run in runs:
        if not run.is_complete:
            raise OptionError(f"the run in {run.path} is not finished: run it again to resume it, then report.")
    target, tables = Path(path), _all_tables(runs)
    html = render(
        "report.html.j2",
        heading=title or _title(runs),
        across=_across(runs) if len(runs) > 1 else None,
        runs=[_run(run, prefix=f"{number}-") for number, run in enumerate(runs)],
        tables=[_table(name, frame) for name, frame in tables.items()],
        citations=_CITATIONS,
    )
    written = {"page": write_text(target, html)}
    folder = target.with_name(target.stem + "-tables")
    for name, frame in tables.items():
        with atomic_path(folder / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
        written[name] = folder / f"{name}.csv"
    return written


def _name(run: ExperimentResult) -> str:
    return f"{Path(run.config.model).name} on {run.task.name}, {run.config.shots} shots"


def _title(runs: Sequence[ExperimentResult]) -> str:
    what = _name(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    return f"Is in-context learning gradient descent? {what}"


# ---- one run ------------------------------------------------------------------------------------------------------


def _run(run: ExperimentResult, *, prefix: str) -> dict[str, Any]:
    """What the sections of one run show; `prefix` keeps figure names apart on a page."""
    config = run.config
    lr = "chosen on held-out rows for every seed" if config.lr == "auto" else f"{config.lr:g}"
    newest = {**(run.provenance[-1] if run.provenance else {}), **run.model}
    return {
        "name": _name(run),
        "prefix": prefix,
        "config": config,
        "comparisons": [_comparison(run, rule) for rule in config.rules],
        "attribution": _attribution(run) if "attributions" in run.table_names else None,
        "example": _example(run),
        "following": _following(run),
        "model": f"{Path(config.model).name} ({run.model.get('architecture', '')}, {config.dtype})",
        "task": run.task.name,
        "learning_rate": lr,
        "rules": [_RULES[rule] for rule in config.rules],
        "source": str(run.data.get("source", config.data or "hub")),
        "notes": run.notes,
        "provenance": {k: _short(v) for k, v in newest.items() if not isinstance(v, list | dict)},
    }


def _comparison(run: ExperimentResult, rule: Literal["gd", "lcgd"]) -> dict[str, Any]:
    found = run.comparison(rule)
    answers = findings(found)
    return comparison_context(found) | {
        "key": rule,
        "rule": _RULES[rule],
        "headline": headline(answers),
        "findings": answers,
        "controls": _controls(run, rule, found),
        "further": _further(found),
        "published": _published(run, rule, found),
    }


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
            "as high as the similarity": null_of(name).high,
            "low": null_of(name).low,
            "after": null_of(name).source or "–",
            "seconds": f"{took[name]:.1f}" if name in took else "as uphill" if "uphill" in name else "no further runs",
        }
        for name in dict.fromkeys(null for statistic in comparison.statistics for null in statistic.nulls)
    ]
    together = f"{took[FURTHER]:.1f} for all questions" if FURTHER in took else "–"
    rows += [
        {
            "control": question.key,
            "as high as the similarity": question.high,
            "low": question.low,
            "after": question.source,
            "seconds": together,
        }
        for question in ([] if comparison.further is None else further_questions(comparison.further))
    ]
    return pd.DataFrame(rows)


def _further(comparison: Comparison) -> list[tuple[str, go.Figure]]:
    """A title and a figure for each of the sceptic's further results."""
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
    return [(title, figure) for title, figure in figures.items() if figure is not None]


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


def _attribution(run: ExperimentResult) -> dict[str, Any]:
    table, seeds = run.table("attributions"), run.table("attribution_seeds")[list(_SEED_TITLES)]
    ranked = table.sort_values("rank", kind="stable").head(_HEADS_SHOWN)[list(_HEAD_TITLES)]
    counts = {c: seeds[c].map(_count) for c in ("heads_needed", "heads_low", "heads_high")}
    return {
        "maps": [(words(metric), _effect_map(group)) for metric, group in table.groupby("metric", sort=False)],
        "recovered": [_recovered(row) for row in run.table("attribution_recovery").to_dict("records")],
        "seeds": seeds.assign(**counts, metric=seeds["metric"].map(words)).rename(columns=_SEED_TITLES),
        "ranked": ranked.assign(metric=ranked["metric"].map(words)).rename(columns=_HEAD_TITLES),
    }


def _following(run: ExperimentResult) -> dict[str, Any] | None:
    found = run.label_following()
    return None if found is None else {"plot": found.plot(), "table": found.to_frame(), "notes": found.notes}


def _effect_map(effects: pd.DataFrame) -> go.Figure:
    grid = effects.pivot(index="layer", columns="head", values="exact")
    plot = go.Figure(heat_map(grid.to_numpy().tolist(), max(float(grid.abs().to_numpy().max()), 1e-9)))
    plot.update_layout(height=min(max(130 + 26 * len(grid), 220), 720), margin={"l": 44, "r": 10, "t": 20, "b": 40})
    plot.update_xaxes(title="head", dtick=1)
    plot.update_yaxes(title="layer", autorange="reversed", dtick=1)
    return plot


def _count(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.0f}"


def _recovered(row: dict[Any, Any]) -> str:
    """The recovery over all sets in one sentence."""
    start = f"{words(row['metric']).capitalize()}: "
    if pd.isna(row["heads_needed"]):
        return start + str(row["note"])
    interval = "" if pd.isna(row["heads_low"]) else f" ({row['heads_low']:.0f} to {row['heads_high']:.0f})"
    return (
        f"{start}{row['heads_needed']:.0f}{interval} heads recover 90 % of the in-context gain on held-out queries "
        f"({row['note']})."
    )


def _example(run: ExperimentResult) -> dict[str, str] | None:
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
        "attention": attention_view(example, heads).html,
        "shares": token_view(example, heads).html,
    }


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:28] + "…" + text[-28:]


def run_sentences(run: ExperimentResult) -> list[str]:
    """Accuracies of every rule with their intervals, then notes: a run in short, for the terminal.

    Args:
        run: a finished run.
    """
    table, found = run.table("accuracies"), []
    for rule in run.config.rules:
        rows = {row["quantity"]: row for row in table[table["rule"] == rule].to_dict("records")}
        known = [(name, rows[f"accuracy {name}"]) for name in ("ZS", "ICL", "FT") if f"accuracy {name}" in rows]
        texts = [f"{name} {row['value']:.3f} {_bracketed(row)}" for name, row in known]
        if texts:
            found.append(f"{rule}: accuracy {', '.join(texts)}")
    return [*found, *(f"note: {note}" for note in run.notes)]


def _bracketed(row: dict[Any, Any]) -> str:
    return "(no interval)" if pd.isna(row["low"]) else f"[{row['low']:.3f}, {row['high']:.3f}]"


# ---- all runs -----------------------------------------------------------------------------------------------------


def _across(runs: Sequence[ExperimentResult]) -> dict[str, Any]:
    rows = []
    for run in runs:
        for rule in run.config.rules:
            found = run.comparison(rule)
            row: dict[str, Any] = {"run": _name(run), "rule": rule}
            row |= {f.key: f.answer for f in findings(found)}
            row["z total"] = float(found["z total"].values.nanmean())
            row["SimAOU"] = float(found["SimAOU"].values.nanmean())
            row["SimAOU null"] = float(found["SimAOU"].nulls["analytic"].nanmean())
            rows.append(row)
    maps = [(comparison_map(run.comparison(run.config.rules[0])), _name(run)) for run in runs]
    return {"table": pd.DataFrame(rows), "maps": maps}


def _all_tables(runs: Sequence[ExperimentResult]) -> dict[str, pd.DataFrame]:
    return {
        name if len(runs) == 1 else f"{number}-{name}": run.table(name)
        for number, run in enumerate(runs)
        for name in run.table_names
    }


def _table(name: str, frame: pd.DataFrame) -> dict[str, Any]:
    """A table to be opened on the page, with its CSV inside the page."""
    csv = base64.b64encode(frame.to_csv(index=False).encode()).decode()
    shown = frame.dropna(axis=1, how="all").head(_ROWS_SHOWN)
    return {"name": name, "n_rows": len(frame), "csv": csv, "shown": shown}
