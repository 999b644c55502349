"""One HTML page that shows a comparison and needs no network; its parts also make up the report."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens.analysis import Comparison
from metaopt_lens.viz._answers import comparison_sentences
from metaopt_lens.viz._assets import page
from metaopt_lens.viz._comparison import comparison_data, comparison_map
from metaopt_lens.viz._html import facts, figure, section, sortable_table

_MAPS = ("z total", "z total, position-matched", "z direct", "linear", "matrices")
_CURVES = ("SimAOU", "SimAOU unnormalised", "SimAM ICL-FT", "SimAM difference")


def write_comparison_page(comparison: Comparison, path: str | os.PathLike[str], title: str | None = None) -> Path:
    """Write a self-contained page: predictions, every similarity next to its nulls, layer x head maps, all tables."""
    heading = title or f"In-context learning against finetuning in {Path(comparison.model.name).name}"
    made_with = {"weights": comparison.model.weights, **comparison.provenance}
    body = [
        f"<header><h1>{escape(heading)}</h1><p>The same demonstrations, once read in context and once learned by "
        "gradient descent on the key and value projections. What each adds to every attention head's output is "
        "compared; a similarity says something only where it stands clear of its nulls.</p></header>",
        predictions_section(comparison),
        summary_section(comparison),
        *maps_sections(comparison),
        tables_section(comparison),
        section("Made with", facts({escape(k): escape(str(v)) for k, v in made_with.items()})),
    ]
    return write_text(path, page(heading, "\n".join(body), with_plotly=True))


def predictions_section(comparison: Comparison, name: str = "Predictions") -> str:
    """Accuracies, agreement and Rec2FTP; says why where there are none."""
    try:
        table = comparison.accuracies()
        recall = comparison.rec2ftp()
    except UndefinedMetricError as error:
        return section(name, f'<p class="ml-notice">{escape(str(error))}</p>')
    note = (
        f"{recall.n_queries} queries; 95 % intervals {escape(comparison.scope)}. ZS: zero-shot, ICL: in context, FT: "
        "finetuned, zero-shot prompt. Recall to finetuning predictions (Rec2FTP), with exact 95 % intervals that take "
        f"queries as independent: {escape(recall.text)}, which is P(ICL right | ZS wrong)."
    )
    answers = "".join(f"<p>{escape(sentence)}</p>" for sentence in comparison_sentences(comparison))
    return section(name, sortable_table(table) + answers, note)


def summary_section(comparison: Comparison, name: str = "Similarities and their nulls") -> str:
    """One row per statistic."""
    frame = comparison.summary()
    nulls = [c for c in frame.columns if c.startswith("null: ")]
    columns = ["statistic", "level", "value", "value_low", "value_high", *nulls, "excess", "excess_low", "excess_high"]
    frame = frame[[*columns, "significant", "of", "undefined", "values"]].rename(columns={"significant": "stand out"})
    note = (
        "Means over layers, heads and queries with 95 % t intervals ("
        f"{escape(comparison.scope)}); none where all values are equal or there is one. <em>excess</em> is over "
        "another query's finetuning update (other query) where there is one, else over the first null listed. "
        "<em>stand out</em>: heads or layers whose excess differs from 0 at 5 % after Benjamini-Hochberg, by a t test "
        "over demonstration sets; with fewer than three sets nothing can be tested. <em>undefined</em>: values "
        "that are left out, such as differences that are no larger than rounding."
    )
    return section(name, sortable_table(frame), note)


def maps_sections(comparison: Comparison, *, prefix: str = "", label: str = "") -> list[str]:
    """Layer x head maps and depth curves of the statistics there are; `prefix` keeps figure names apart on a page."""
    names = {s.name for s in comparison.statistics}
    maps = "".join(
        figure(comparison_map(comparison, name), f"{prefix}map-{i}", comparison[name].description)
        for i, name in enumerate(n for n in _MAPS if n in names)
    )
    curves = "".join(
        figure(comparison_map(comparison, name), f"{prefix}curve-{i}", comparison[name].description)
        for i, name in enumerate(n for n in _CURVES if n in names)
    )
    return [
        section(
            f"Head by head{label}", f'<div class="ml-wide">{maps}</div>', "Value, null and excess on one colour scale."
        ),
        section(
            f"By depth{label}",
            f'<div class="ml-cards">{curves}</div>',
            "Means over heads and queries, with their nulls.",
        ),
    ]


def tables_section(comparison: Comparison) -> str:
    """Every statistic at every head, folded away."""
    frame = comparison.to_frame()
    parts = []
    for name, group in frame.groupby("statistic", sort=False):
        shown = group.drop(columns=["statistic", "level"]).dropna(axis=1, how="all")
        parts.append(f"<details><summary>{escape(str(name))}</summary>{sortable_table(shown)}</details>")
    return section("All tables", "".join(parts))


def write_comparison_outputs(comparison: Comparison, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``comparison.csv``, ``comparison.json`` and ``comparison.html``; returns their paths."""
    base = Path(folder)
    with atomic_path(base / "comparison.csv") as temporary:
        comparison.to_frame().to_csv(temporary, index=False)
    text = json.dumps(comparison_data(comparison), indent=1, ensure_ascii=False)
    return {
        "table": base / "comparison.csv",
        "data": write_text(base / "comparison.json", text + "\n"),
        "page": write_comparison_page(comparison, base / "comparison.html"),
    }
