"""What was expected before the runs (docs/data/expected.toml), next to what came."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from _result_data import SETTINGS, Data, keys_of, number, rows_of

from metaopt_lens.experiments import CLAIMS, markdown_table

# What else is said of what came: a table, the column that tells its rows apart, and the column of numbers.
_MEASURED = {
    "ceiling": ("ceiling", "update", "r_squared"),
    "ladder": ("ladder", "rung", "r_squared"),
    "order": ("order", "learner", "spread"),
    "algebra": ("algebra", "quantity", "estimate"),
    "item_1": ("summary", "statistic", "value"),
    "uphill": ("summary", "statistic", "value"),
    "layer_causal": ("summary", "statistic", "value"),
    "untrained": ("summary", "statistic", "value"),
}
_SUMMARY_ROWS = {
    "item_1": ("z total: contrast", "z total: format", "z total: rest"),
    "uphill": ("z total",),
    "layer_causal": ("SimAOU",),
    "untrained": ("SimAOU",),
}
# What an entry of expected.toml is about, by the end of its name.
_ABOUT = {"accuracy": ("learns", "finetunes"), "item_1": ("contrast",), "item_3": ("prior", "prior_finetuned")}
_WHAT = {claim.key: claim.what for claim in CLAIMS}


def expected(data: Data) -> list[str]:
    """Every entry of ``expected.toml`` with what came out in the run that it names."""
    if not data.expected:
        return []
    parts = ["## What was expected, and what came", "Written before the runs, with the date, and quoted as it stands."]
    for name, entry in data.expected.items():
        found = _run_of(data.claims, str(entry["run"]))
        rows = [
            [text, _came(data, found, about)]
            for about, text in entry.items()
            if about not in ("written", "run", "known") and isinstance(text, str)
        ]
        parts.append(f"### {name}\n\nWritten {entry['written']}: `{entry['run']}`")
        if "known" in entry:
            parts.append(str(entry["known"]))
        parts.append(markdown_table(["expected", "came"], rows))
    return parts


def _run_of(claims: pd.DataFrame, command: str) -> pd.DataFrame:
    """The rows of the run that a text describes by its options; a model in words is SmolLM2."""

    def option(name: str, default: str) -> str:
        match = re.search(rf"--{name} ([\w-]+)", command)
        return match[1] if match else default

    asked = {"model": option("model", "smollm2"), "task": option("task", ""), "labels": option("labels", "natural")}
    for axis, value in asked.items():
        claims = claims[claims[axis] == value]
    claims = claims[claims["shots"] == int(option("shots", "0"))]
    own = claims["directory"] == f"{option('queries', '')} queries"
    return claims[own] if own.any() else claims


def _came(data: Data, run: pd.DataFrame, about: str) -> str:
    if run.empty:
        return "not run yet"
    if about != "layer_causal":  # the only entry about two rules
        run = run[run["rule"] == run["rule"].iloc[0]]
    key = keys_of(run)[0]
    cells = []
    if about in ("accuracy", "item_3"):
        own = rows_of(data.table("accuracies"), key)
        wanted = own[own["quantity"].isin(SETTINGS) | own["quantity"].str.contains("against the")]
        cells += [
            f"{row['quantity']} {number(row, 'value', 'low', 'high', '{:.2f}')}"
            for row in wanted.to_dict("records")
            if row["value"] == row["value"] and (about == "accuracy") == (row["quantity"] in SETTINGS)
        ]
    if about == "item_3":
        cells += _following(data, key[:-1])
    if about in _MEASURED:
        cells += _measured(data, key[:-1] if about == "layer_causal" else key, about)
    for claim in _ABOUT.get(about, (about,)):
        for row in run[(run["claim"] == claim) & (run["verdict"] != "lacking")].to_dict("records"):
            of = f" ({row['value']:.3f} less {row['null']:.3f})" * (row["value"] == row["value"] and row["null"] != 0)
            numbers = "" if row["estimate"] != row["estimate"] else f" {number(row, 'estimate', 'low', 'high')}"
            why = f" ({row['because']})" if row["because"] else ""
            cells.append(f"{_WHAT[claim]}:{numbers}{of}, {row['verdict']}{why}")
    return "; ".join(cells) or "not measured"


def _measured(data: Data, run: Sequence[Any], about: str) -> list[str]:
    """The numbers themselves, of which a claim reads the difference."""
    name, names, column = _MEASURED[about]
    own = rows_of(data.table(name), run)
    if name == "ceiling":
        own = own[own["target"] == "value"]
    elif name == "summary":
        own = own[own[names].isin(_SUMMARY_ROWS[about])]
    elif name == "algebra":
        own = own[own[names].str.startswith("R^2")]
    rules = own["rule"].nunique() > 1
    low, high = ("low", "high") if "low" in own else (f"{column}_low", f"{column}_high")
    return [
        f"{row[names]}{' (layer-causal)' * (rules and row['rule'] == 'lcgd')} "
        f"{number(row, column, low, high, '{:.3f}')}"
        for row in own.to_dict("records")
        if row[column] == row[column]
    ]


def _following(data: Data, run: Sequence[Any]) -> list[str]:
    """In context, behind the demonstrations' label words: how often what they show, and how often the natural label."""
    table = data.table("label_following")
    if table.empty:
        return []
    own = rows_of(table, run)
    own = own[(own["learner"] == "in context") & (own["label_words"] != "natural")]
    return [
        f"in context, {row['label_words']} labels, against the {row['against']} ones "
        f"{number(row, 'accuracy', 'low', 'high', '{:.2f}')}"
        for row in own.to_dict("records")
    ]
