"""A comparison as tables for the terminal (rich), and as plain data (JSON)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis import Comparison, findings, is_part

_IN_PARTS = "z total: "


def comparison_text(comparison: Comparison) -> Table:
    """A terminal table: every statistic with its interval, next to its main null.

    ``clear``: heads or layers that differ from the null (Benjamini-Hochberg); undefined with fewer than three sets.

    Args:
        comparison: what `compare` returned.
    """
    table = _terminal_table(f"In-context against finetuning updates, 95 % intervals {comparison.scope}")
    table.add_column("statistic", no_wrap=True)
    for name in ("value", "interval", "null", "clear"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.summary().to_dict("records"):
        name = str(row["statistic"])
        if is_part(name) and not name.startswith(_IN_PARTS):
            continue  # a page has them all
        table.add_row(
            name,
            _signed(row["value"]),
            "none" if np.isnan(row["value_low"]) else f"{row['value_low']:+.2f}..{row['value_high']:+.2f}",
            f"{row['main_null']} {_signed(row['null: ' + row['main_null']])}",
            "-" if pd.isna(row["significant"]) else f"{row['significant']}/{row['of']}",
        )
    return table


def _terminal_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.pad_edge = table.show_edge = False
    return table


def frame_text(frame: pd.DataFrame, title: str) -> Table:
    """Any table for the terminal.

    Args:
        frame: the table.
        title: the line above it.
    """
    table = _terminal_table(title)
    for index, column in enumerate(frame.columns):
        table.add_column(str(column), justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in frame.itertuples(index=False):
        table.add_row(*(_signed(float(v)) if isinstance(v, float | np.floating) else str(v) for v in row))
    return table


def accuracies_text(comparison: Comparison) -> Table:
    """A terminal table: accuracies and agreement of the zero-shot, in-context and finetuned model.

    Args:
        comparison: what `compare` returned.
    """
    table = _terminal_table("Predictions of the zero-shot, in-context and finetuned model")
    for name in ("quantity", "value", "95 % interval", "n"):
        table.add_column(name, justify="left" if name == "quantity" else "right")
    for row in comparison.accuracies().to_dict("records"):
        interval = "none: equal values" if np.isnan(row["low"]) else f"{row['low']:.1%} to {row['high']:.1%}"
        table.add_row(str(row["quantity"]), f"{row['value']:.1%}", interval, str(row["n"]))
    table.caption = f"Rec2FTP {comparison.rec2ftp().text}"
    table.caption_justify = "left"
    return table


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """Summary, table and predictions as plain data, ready for JSON (NaN as None).

    Args:
        comparison: what `compare` returned.
    """

    def plain(records: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
        return [{k: None if pd.isna(v) else getattr(v, "item", lambda v=v: v)() for k, v in r.items()} for r in records]

    data: dict[str, Any] = {
        "model": comparison.model.name,
        "scope": comparison.scope,
        "findings": plain([dataclasses.asdict(f) | {"sentence": f.sentence} for f in findings(comparison)]),
        "settings": comparison.settings,
        "answers": {
            name: {
                "candidate_mass": own.candidate_mass.tolist(),
                "label_rank": [rank if rank > 0 else None for rank in own.label_rank.tolist()],
            }
            for name, own in comparison.answers.items()
        },
        "provenance": comparison.provenance,
        "summary": plain(comparison.summary().to_dict("records")),
        "statistics": plain(comparison.to_frame().to_dict("records")),
    }
    try:
        data["predictions"] = plain(comparison.accuracies().to_dict("records"))
        recall = comparison.rec2ftp()
        data["rec2ftp"] = {
            **dataclasses.asdict(recall),
            "value": recall.value,
            "interval": recall.interval(),
            "base_rate": recall.base_rate,
            "undefined": recall.undefined,
        }
    except UndefinedMetricError as error:
        data["predictions"] = {"undefined": str(error)}
    return data


def _signed(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.3f}"
