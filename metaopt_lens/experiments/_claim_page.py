"""Claims as tables to be read: claims down, tasks across, one table for each model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metaopt_lens.analysis import span_text
from metaopt_lens.experiments._claim_table import CLAIMS, Claim

if TYPE_CHECKING:
    import pandas as pd

RULES = {"gd": "finetuning by gradient descent", "lcgd": "layer-causal finetuning"}
_COLUMN = ["task", "shots", "lr"]
_BLOCK = ("model", "labels", "rule", "directory")


@dataclass(frozen=True)
class ClaimBlock:
    """The table of one model, rule and kind of labels.

    Attributes:
        title: names them.
        tasks: the columns.
        rows: a claim and what each column says of it.
        reasons: why some are undecided; a cell names the first as (1).
    """

    title: str
    tasks: tuple[str, ...]
    rows: tuple[tuple[Claim, tuple[str, ...]], ...]
    reasons: tuple[str, ...]


def claim_blocks(found: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> Iterator[ClaimBlock]:
    """One block per model, labels, rule and directory.

    Args:
        found: of `claims_of`.
        claims: the rows, in their order.
    """
    several = found["directory"].nunique() > 1
    for key, rows in found.groupby(list(_BLOCK), sort=False):
        model, labels, rule, directory = map(str, key)
        words = [model, *([f"{labels} labels"] if labels != "natural" else []), RULES.get(rule, rule)]
        if several and directory:
            words.append(directory)
        runs = rows.drop_duplicates(_COLUMN)
        names = _names(runs)
        reasons: dict[str, int] = {}
        table = []
        for claim in claims:
            own = rows[rows["claim"] == claim.key]
            cells = [_cell(own[(own[_COLUMN] == run).all(axis=1)], reasons) for _, run in runs[_COLUMN].iterrows()]
            if any(cells):
                table.append((claim, tuple(cells)))
        yield ClaimBlock(", ".join(words), names, tuple(table), tuple(reasons))


def claims_markdown(found: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> str:
    """All blocks as Markdown, then what every claim is and how the runs were made.

    Args:
        found: of `claims_of`.
        claims: the rows, in their order.
    """
    parts = []
    for block in claim_blocks(found, claims):
        rows = [[claim.text, *cells] for claim, cells in block.rows]
        parts.append(f"## {block.title}\n\n{markdown_table(['claim', *block.tasks], rows)}")
        if block.reasons:
            parts.append("\n".join(f"{number}. {why}" for number, why in enumerate(block.reasons, 1)))
    rows = [[claim.text, claim.source, claim.what, _option(claim.needs)] for claim in claims]
    header = ["claim", "source", "holds where this is above 0", "a run needs"]
    parts.append(f"## The claims\n\n{markdown_table(header, rows)}")
    runs = found.drop_duplicates(["model", "task", "shots", "lr", "labels", "directory"])
    made: list[list[Any]] = [
        [run["model"], run["task"], f"`{run['command']}`", run["date"], run["version"]]
        for run in runs.astype(object).fillna("").to_dict("records")
    ]
    parts.append(f"## The runs\n\n{markdown_table(['model', 'task', 'command', 'date', 'metaopt-lens'], made)}")
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown.

    Args:
        header: names of the columns.
        rows: their cells.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _names(runs: pd.DataFrame) -> tuple[str, ...]:
    """Of the tasks, with what else tells runs apart."""
    varies = [name for name in ("shots", "lr") if runs.groupby("task", sort=False)[name].nunique().max() > 1]
    return tuple(
        ", ".join([str(run["task"])] + [f"{name} {run[name]}" for name in varies]) for run in runs.to_dict("records")
    )


def _cell(own: pd.DataFrame, reasons: dict[str, int]) -> str:
    """A verdict with its numbers; empty where there is no row."""
    if own.empty:
        return ""
    row = own.iloc[0]
    if row["verdict"] == "lacking":
        return f"needs {_option(str(row['because']).rpartition(': ')[2])}"
    estimate = float(row["estimate"])
    numbers = "" if estimate != estimate else f" {estimate:+.3g}{span_text(row['low'], row['high'], '{:+.3g}')}"
    why = str(row["because"])
    if row["verdict"] != "undecided" or why == "the interval holds 0":
        return f"{row['verdict']}{numbers}"
    return f"undecided ({reasons.setdefault(why, len(reasons) + 1)}){numbers}"


def _option(needs: str) -> str:
    return f"`{needs}`" if needs.startswith("--") else needs
