"""One HTML page that shows a comparison and needs no network; its parts also make up the report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens.analysis import PARTS, Comparison, null_of, part_name
from metaopt_lens.viz._answers import comparison_sentences
from metaopt_lens.viz._comparison_figures import comparison_map
from metaopt_lens.viz._comparison_text import comparison_data
from metaopt_lens.viz._render import Measured, render

_MAPS = (
    *("z total", "z total, position-matched", "z direct", "linear", "matrices"),
    *(part_name("z total", part) for part in PARTS),
)
_NULL, _FEW = "null: ", 4  # the name of a null's column; statistics that fill it, where it gets none of its own
_CURVES = (
    *("SimAOU", "SimAOU unnormalised", "SimAM ICL-FT", "SimAM difference"),
    *(part_name("SimAOU", part) for part in PARTS),
)


def write_comparison_page(comparison: Comparison, path: str | os.PathLike[str], title: str | None = None) -> Path:
    """Write a self-contained page: predictions, every similarity next to its nulls, layer x head maps, all tables.

    Args:
        comparison: what `compare` returned.
        path: the file to write.
        title: heading of the page; by default it names the model.

    Returns:
        The path.
    """
    html = render(
        "comparison.html.j2",
        heading=title or f"In-context learning against finetuning in {Path(comparison.model.name).name}",
        found=comparison_context(comparison),
        tables=[
            (str(name), group.drop(columns=["statistic", "level"]).dropna(axis=1, how="all"))
            for name, group in comparison.to_frame().groupby("statistic", sort=False)
        ],
        provenance={"weights": comparison.model.weights, **comparison.provenance},
    )
    return write_text(path, html)


def comparison_context(comparison: Comparison) -> dict[str, Any]:
    """What ``comparison_parts.html.j2`` shows: predictions or why there are none, summary, maps and curves."""
    names = {s.name for s in comparison.statistics}
    context: dict[str, Any] = {
        "scope": comparison.scope,
        "undefined": None,
        "summary": _summary(comparison),
        **{
            key: [(comparison_map(comparison, n), comparison[n].description) for n in wanted if n in names]
            for key, wanted in (("maps", _MAPS), ("curves", _CURVES))
        },
    }
    try:
        context |= {"accuracies": comparison.accuracies(), "recall": comparison.rec2ftp()}
    except UndefinedMetricError as error:
        return context | {"undefined": str(error)}
    return context | {"sentences": comparison_sentences(comparison)}


def _summary(comparison: Comparison) -> pd.DataFrame:
    """One row per statistic, in as few columns as say everything: nothing is cut off on a screen."""
    frame = comparison.summary()
    found = zip(frame["significant"], frame["of"], strict=True)
    undefined = zip(frame["undefined"], frame["values"], strict=True)
    nulls = [name for name in frame.columns if name.startswith(_NULL) and null_of(name.removeprefix(_NULL)).question]
    usual = [name for name in nulls if frame[name].notna().sum() > _FEW]
    further = [name for name in nulls if name not in usual]
    columns: dict[str, Any] = {
        "statistic": frame["statistic"],
        "level": frame["level"],
        "value": _measured(frame, "value"),
        **{null: frame[null] for null in usual},
        **({"further null": _further_nulls(frame[further])} if further else {}),
        "excess": _measured(frame, "excess"),
        "stand out": ["–" if pd.isna(n) else f"{n} of {of}" for n, of in found],
        "undefined": [f"{n} of {of}" for n, of in undefined],
    }
    return pd.DataFrame(columns)


def _further_nulls(frame: pd.DataFrame) -> list[str]:
    """Of nulls that few statistics have: each row's own, by name."""
    return [
        ", ".join(f"{str(name).removeprefix(_NULL)} {value:.3f}" for name, value in row.items() if value == value)
        or "–"
        for row in frame.to_dict("records")
    ]


def _measured(frame: pd.DataFrame, name: str) -> list[Measured]:
    columns = (frame[name], frame[f"{name}_low"], frame[f"{name}_high"])
    return [Measured(value, low, high) for value, low, high in zip(*columns, strict=True)]


def write_comparison_outputs(comparison: Comparison, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``comparison.csv``, ``comparison.json`` and ``comparison.html``; returns their paths.

    Args:
        comparison: what `compare` returned.
        folder: where the files are written.
    """
    base = Path(folder)
    with atomic_path(base / "comparison.csv") as temporary:
        comparison.to_frame().to_csv(temporary, index=False)
    text = json.dumps(comparison_data(comparison), indent=1, ensure_ascii=False)
    return {
        "table": base / "comparison.csv",
        "data": write_text(base / "comparison.json", text + "\n"),
        "page": write_comparison_page(comparison, base / "comparison.html"),
    }
