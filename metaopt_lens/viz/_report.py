"""The report of one or several runs: one HTML page that can be read and sent, and every table as CSV beside it."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from metaopt_lens._errors import OptionError
from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens.analysis import Comparison, findings, headline
from metaopt_lens.experiments import ExperimentResult, published_numbers
from metaopt_lens.viz._assets import page
from metaopt_lens.viz._comparison import comparison_map
from metaopt_lens.viz._comparison_page import maps_sections, predictions_section, summary_section
from metaopt_lens.viz._effects import heat_map
from metaopt_lens.viz._heads import N_STRONGEST
from metaopt_lens.viz._html import facts, figure, section, sortable_table
from metaopt_lens.viz._views import attention_view, token_view

_RULES = {"gd": "ordinary gradient descent", "lcgd": "layer-causal gradient descent"}
_CITATIONS = (
    "Dai, D., Sun, Y., Dong, L., Hao, Y., Ma, S., Sui, Z., Wei, F. (2023). Why Can GPT Learn In-Context? Language "
    "Models Secretly Perform Gradient Descent as Meta-Optimizers. Findings of ACL 2023. arXiv:2212.10559.",
    "Deutch, G., Magar, N., Bar Natan, T., Dar, G. (2024). In-context Learning and Gradient Descent Revisited. NAACL "
    "2024. arXiv:2311.07772.",
    "Nanda, N., Bloom, J. (2022). TransformerLens.",
)


def write_report(
    runs: Sequence[ExperimentResult], path: str | os.PathLike[str], *, title: str | None = None
) -> dict[str, Path]:
    """Write the page and the tables; several runs are compared first, then shown one after the other.

    The page carries everything it needs, forbids itself to load anything, and prints well.

    Args:
        path: the HTML file; tables go to a folder of the same name with ``-tables`` instead of the ending.

    Returns:
        Paths by name: ``page`` and one entry per table.

    Raises:
        OptionError: no runs, or one that is not finished.
    """
    if not runs:
        raise OptionError("a report needs at least one run.")
    for run in runs:
        if not run.is_complete:
            raise OptionError(f"the run in {run.path} is not finished: run it again to go on, then report.")
    target = Path(path)
    heading = title or _title(runs)
    body = [f"<header><h1>{escape(heading)}</h1>{_lead()}</header>"]
    if len(runs) > 1:
        body.append(_across(runs))
    for number, run in enumerate(runs):
        body += _run_sections(run, prefix=f"{number}-", name=_name(run) if len(runs) > 1 else "")
    body += [_tables(runs), _citations()]
    written = {"page": write_text(target, page(heading, "\n".join(body), with_plotly=True))}
    folder = target.with_name(target.stem + "-tables")
    for name, frame in _all_tables(runs):
        with atomic_path(folder / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
        written[name] = folder / f"{name}.csv"
    return written


def _name(run: ExperimentResult) -> str:
    return f"{Path(run.config.model).name} on {run.task.name}, {run.config.shots} shots"


def _title(runs: Sequence[ExperimentResult]) -> str:
    if len(runs) == 1:
        return f"Is in-context learning gradient descent? {_name(runs[0])}"
    return f"Is in-context learning gradient descent? {len(runs)} runs"


def _lead() -> str:
    return (
        "<p>The same demonstrations are given to a model in context, and learned by the same model through gradient "
        "descent on its key and value projections. This report holds the two changes against each other, head by head, "
        "and every similarity against what chance, any query, or any finetuning would give.</p>"
    )


# ---- one run ------------------------------------------------------------------------------------------------------


def _run_sections(run: ExperimentResult, *, prefix: str, name: str) -> list[str]:
    parts = [f'<h2 class="ml-run">{escape(name)}</h2>'] if name else []
    for rule in run.config.rules:
        found = run.comparison(rule)
        parts.append(_verdict(found, rule))
    parts.append(_accuracies(run))
    for rule in run.config.rules:
        found = run.comparison(rule)
        label = f" ({_RULES[rule]})" if len(run.config.rules) > 1 else ""
        parts.append(summary_section(found, f"Similarities and their nulls{label}"))
        published = _published(run, rule, found)
        if published:
            parts.append(published)
        parts += maps_sections(found, prefix=f"{prefix}{rule}-", label=label)
    parts += [_attribution(run, prefix), _examples(run), _methods(run), _made_with(run)]
    return [part for part in parts if part]


def _verdict(comparison: Comparison, rule: str) -> str:
    answers = findings(comparison)
    rows = "".join(
        f'<tr><td>{escape(f.question)}</td><td class="ml-answer ml-{f.answer}">{f.answer}</td>'
        f"<td>{escape(f.sentence)}</td></tr>"
        for f in answers
    )
    note = (
        f"Finetuning by {_RULES[rule]}; intervals {escape(comparison.scope)}. <em>yes</em>: the 95 % interval lies "
        "above 0, <em>no</em>: below, <em>unclear</em>: it holds 0, <em>undecided</em>: the data cannot say."
    )
    return section(
        f"Verdict: {_RULES[rule]}",
        f'<p class="ml-verdict">{escape(headline(answers))}</p>'
        f'<table class="ml-findings"><tbody>{rows}</tbody></table>',
        note,
    )


def _accuracies(run: ExperimentResult) -> str:
    rules = run.config.rules
    return "".join(
        predictions_section(run.comparison(rule), f"Predictions, {_RULES[rule]}" if len(rules) > 1 else "Predictions")
        for rule in rules
    )


def _published(run: ExperimentResult, rule: str, comparison: Comparison) -> str:
    numbers = published_numbers(run.config.model, run.task.name, rule)
    if not numbers:
        return ""
    own = {row["quantity"]: 100 * row["value"] for row in comparison.accuracies().to_dict("records")}
    own["Rec2FTP"] = comparison.rec2ftp().value
    own |= {row["statistic"]: row["value"] for row in comparison.summary().to_dict("records")}
    rows = [
        {"quantity": n.quantity, "published": n.value, "here": own.get(n.quantity), "source": n.source} for n in numbers
    ]
    note = (
        "The published runs chose seed and learning rate by validation accuracy and recorded the attention output at "
        "the label token of class 0; this run reads the token that predicts the label."
    )
    return section("Against the published numbers", sortable_table(pd.DataFrame(rows)), note)


def _attribution(run: ExperimentResult, prefix: str) -> str:
    if "attributions" not in run.table_names:
        return ""
    table = run.table("attributions")
    plots = []
    for number, (metric, group) in enumerate(table.groupby("metric", sort=False)):
        grid = group.pivot(index="layer", columns="head", values="exact")
        bound = max(float(grid.abs().to_numpy().max()), 1e-9)
        plot = go.Figure(heat_map(grid.to_numpy().tolist(), bound))
        plot.update_layout(height=min(max(130 + 26 * len(grid), 220), 720), margin={"l": 44, "r": 10, "t": 20, "b": 40})
        plot.update_xaxes(title="head", dtick=1)
        plot.update_yaxes(title="layer", autorange="reversed", dtick=1)
        caption = f"{_words(metric)}: what is lost when the head's meta-gradient alone is knocked out"
        plots.append(figure(plot, f"{prefix}attribution-{number}", caption))
    rows = run.table("attribution_recovery").to_dict("records")
    sentences = "".join(f"<p>{escape(_recovered(row))}</p>" for row in rows)
    ranked = table.sort_values("rank", kind="stable").head(40)[list(_HEAD_TITLES)].rename(columns=_HEAD_TITLES)
    seeds = run.table("attribution_seeds")[list(_SEED_TITLES)]
    counts = {c: seeds[c].map(_count) for c in ("heads_needed", "heads_low", "heads_high")}
    seeds = seeds.assign(**counts, metric=seeds["metric"].map(_words)).rename(columns=_SEED_TITLES)
    ranked = ranked.assign(metric=ranked["metric"].map(_words))
    body = f'<div class="ml-maps">{"".join(plots)}</div><h3>Heads that recover 90 % of the in-context gain</h3>'
    body += sentences + sortable_table(seeds) + "<h3>Heads by effect</h3>" + sortable_table(ranked)
    note = (
        "Exact knock-outs with 95 % intervals, and the first-order estimate from one backward pass. For the recovery, "
        "heads are ranked on one half of each set's queries and added in that order on the other half; the number is "
        "that of the last upward crossing of 90 %."
    )
    return section("Which heads drive the answer", body, note)


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


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _count(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.0f}"


def _recovered(row: dict[Any, Any]) -> str:
    """The recovery over all sets in one sentence."""
    start = f"{_words(row['metric']).capitalize()}: "
    if pd.isna(row["heads_needed"]):
        return start + str(row["note"])
    interval = "" if pd.isna(row["heads_low"]) else f" ({row['heads_low']:.0f} to {row['heads_high']:.0f})"
    return (
        f"{start}{row['heads_needed']:.0f}{interval} heads recover 90 % of the in-context gain on held-out queries "
        f"({row['note']})."
    )


def _examples(run: ExperimentResult) -> str:
    """circuitsvis views of the strongest heads on the first prompt: those that the table of effects names first."""
    example = run.example()
    if example is None:
        return ""
    if "attributions" in run.table_names:
        table = run.table("attributions")
        table = table[table["metric"] == table["metric"].iloc[0]]
        heads = table.sort_values("rank", kind="stable")["name"].head(N_STRONGEST).tolist()
        why = "The four heads with the largest measured effect"
    else:
        heads = [str(ref) for ref in example.heads(N_STRONGEST)]
        why = "The four heads with the largest meta-gradient in the residual stream (no effects were measured)"
    parts = [
        f'<div class="ml-cards">{attention_view(example, heads).html}</div>',
        "<h3>Where the meta-gradient comes from</h3>",
        f'<div class="ml-cards">{token_view(example, heads).html}</div>',
    ]
    return section("The strongest heads on one prompt", "".join(parts), f"{why}; demonstrations are marked by colour.")


def _methods(run: ExperimentResult) -> str:
    c, model, data = run.config, run.model, run.data
    lr = "chosen on held-out rows for every seed" if c.lr == "auto" else f"{c.lr:g}"
    sentences = [
        f"Model: {escape(Path(c.model).name)} ({model.get('architecture', '')}, {c.dtype}).",
        f"Task: {escape(run.task.name)}, {c.variant} template, {c.shots} demonstrations per set, selected by "
        f"“{c.selection}”, seeds {', '.join(map(str, c.seeds))}; {c.queries or 'all'} queries.",
        f"Finetuning: SGD, {c.epochs} epoch(s), one demonstration a step in the order of the prompt, cross-entropy",
        "over all predicted tokens, key and value projections of every layer (with their biases),",
        f"learning rate {lr}; rules: {', '.join(_RULES[r] for r in c.rules)}.",
        "In-context, zero-shot and finetuned zero-shot runs are read at the token that predicts the label; labels are",
        "scored by the mean log-probability of their tokens. Updates are differences of head outputs before the output",
        "projection unless said otherwise.",
        "Nulls: another query's finetuning update (other query), random directions, randomly shuffled demonstration",
        "labels (several draws), flipped label words, finetuning on unrelated text of equal update norm, and permuted",
        "weights, where they were run; SimAOU also has its analytic null. Intervals: 95 %, Student's t over",
        "demonstration sets; counts of heads by a t test over at least three sets with Benjamini-Hochberg correction.",
        f"Data: {escape(str(data.get('source', c.data or 'hub')))}.",
    ]
    text = " ".join(sentences)
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return section("Methods", f"<p>{text}</p>" + (f"<ul>{notes}</ul>" if notes else ""))


def _made_with(run: ExperimentResult) -> str:
    entries = run.provenance
    newest = entries[-1] if entries else {}
    items = {escape(k): escape(_short(v)) for k, v in {**newest, **run.model}.items() if not isinstance(v, list | dict)}
    return section("Made with", facts(items))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:28] + "…" + text[-28:]


# ---- all runs -----------------------------------------------------------------------------------------------------


def _across(runs: Sequence[ExperimentResult]) -> str:
    rows = []
    for run in runs:
        for rule in run.config.rules:
            found = run.comparison(rule)
            answers = findings(found)
            row: dict[str, Any] = {"run": _name(run), "rule": rule}
            row |= {f.key: f.answer for f in answers}
            row["z total"] = float(found["z total"].values.nanmean())
            row["SimAOU"] = float(found["SimAOU"].values.nanmean())
            row["SimAOU null"] = float(found["SimAOU"].nulls["analytic"].nanmean())
            rows.append(row)
    maps = "".join(
        figure(comparison_map(run.comparison(run.config.rules[0])), f"across-{i}", _name(run))
        for i, run in enumerate(runs)
    )
    return section("All runs", sortable_table(pd.DataFrame(rows)) + f'<div class="ml-wide">{maps}</div>')


def _all_tables(runs: Sequence[ExperimentResult]) -> list[tuple[str, pd.DataFrame]]:
    found = []
    for number, run in enumerate(runs):
        for name in run.table_names:
            stem = name if len(runs) == 1 else f"{number}-{name}"
            found.append((stem, run.table(name)))
    return found


def _tables(runs: Sequence[ExperimentResult]) -> str:
    """Every table, folded away, with its CSV inside the page."""
    parts = []
    for name, frame in _all_tables(runs):
        csv = base64.b64encode(frame.to_csv(index=False).encode()).decode()
        link = f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{csv}">{escape(name)}.csv</a>'
        shown = sortable_table(frame.dropna(axis=1, how="all").head(500))
        cut = "" if len(frame) <= 500 else f"<p>The first 500 of {len(frame)} rows; the CSV has all.</p>"
        parts.append(
            f"<details><summary>{escape(name)} ({len(frame)} rows)</summary><p>{link}</p>{cut}{shown}</details>"
        )
    return section("All tables", "".join(parts), "Each table can be opened here and saved as CSV.")


def _citations() -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in _CITATIONS)
    return section("Citations", f"<ol>{items}</ol>")
