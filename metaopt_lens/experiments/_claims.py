"""Published claims, evaluated on the tables of runs (docs/theory.md, section 4): holds, does not hold, or undecided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis import MIN_SETS_TO_TEST, mean_interval
from metaopt_lens.experiments._claim_table import CLAIMS, Answer, Cell, Claim, Difference, Of
from metaopt_lens.experiments._sweep_result import AXES

if TYPE_CHECKING:
    import pandas as pd

Tables = Callable[[str], "pd.DataFrame"]  # raises OptionError where there is no such table
Verdict = Literal["holds", "does not hold", "undecided", "lacking"]

_UNKNOWN = float("nan")
_WORKS = {"in_context_learning": "the model learns in context", "finetuning": "finetuning helps"}


@dataclass(frozen=True)
class _Found:
    """An estimate with its interval; `because` says why nothing can be decided from it."""

    estimate: float
    low: float
    high: float
    n_sets: int
    value: float = _UNKNOWN
    null: float = _UNKNOWN
    because: str = ""
    answer: str = ""


def evaluate_claims(tables: Tables, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """One row per claim, run and rule.

    Columns: those of the run (model, task, shots, lr, labels, rule), ``claim``, ``verdict``, ``estimate`` with its 95 %
    t interval ``low``..``high`` over ``n_sets`` demonstration sets, ``value`` and ``null`` whose difference it is, and
    ``because``. A verdict is ``holds`` where the interval lies above 0, ``does not hold`` where it lies below,
    ``undecided`` where it holds 0, with fewer than three sets, or where a similarity is asked about and in-context
    learning or finetuning is not shown to work; ``lacking`` where the run has not made what the claim reads.

    Args:
        tables: gives a table by name, with columns model, task, shots, lr, labels that say which run a row is of.
        claims: the rows.

    Raises:
        OptionError: no claim can be evaluated: the runs lack everything.
    """
    import pandas as pd

    known = _Known(tables)
    rows = [_row(known, claim, run, rule) for run in known.runs() for claim in claims for rule in _rules(claim, run)]
    found = pd.DataFrame(rows)
    if found.empty or (found["verdict"] == "lacking").all():
        options = ", ".join(dict.fromkeys(claim.needs for claim in claims))
        raise OptionError(
            f"no claim can be evaluated: the tables have nothing that one reads. Run again with one of {options}."
        )
    return found


class _Known:
    """Tables, read once; None where there is no such table."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._read: dict[str, pd.DataFrame | None] = {}

    def __getitem__(self, name: str) -> pd.DataFrame | None:
        if name not in self._read:
            try:
                self._read[name] = self._tables(name)
            except OptionError:
                self._read[name] = None
        return self._read[name]

    def runs(self) -> list[dict[str, Any]]:
        """The runs, each with its rules."""
        found = self["accuracies"] if self["set_means"] is None else self["set_means"]
        if found is None:
            return []
        groups = found.groupby(list(AXES), sort=False, dropna=False)
        return [{**dict(zip(AXES, key, strict=True)), "rules": tuple(rows["rule"].unique())} for key, rows in groups]

    def of(self, name: str, run: dict[str, Any], rule: str | None) -> pd.DataFrame | None:
        """The rows of a run and a rule; None where there are none."""
        table = self[name]
        if table is None:
            return None
        for axis in AXES:
            table = table[table[axis] == run[axis]]
        if rule is not None and "rule" in table:
            table = table[table["rule"] == rule]
        return None if table.empty else table


def _rules(claim: Claim, run: dict[str, Any]) -> tuple[str, ...]:
    """A claim about two rules is one row, under its own where there is that."""
    own = claim.reads.value.rule if isinstance(claim.reads, Difference) else None
    rules: tuple[str, ...] = run["rules"]
    return rules if own is None else (own,) if own in rules else rules[:1]


def _row(known: _Known, claim: Claim, run: dict[str, Any], rule: str) -> dict[str, Any]:
    found = _read(known, claim.reads, run, rule)
    head = {axis: run[axis] for axis in AXES} | {"rule": rule, "claim": claim.key}
    if found is None:
        because = f"the run has not made it: {claim.needs}"
        empty = dict.fromkeys(("estimate", "low", "high", "value", "null"), _UNKNOWN)
        return {**head, "verdict": "lacking", **empty, "n_sets": 0, "because": because}
    because = _too_few(found) or found.because or (_does_not_work(known, run, rule) if claim.similarity else "")
    if not because and found.low != found.low and not found.answer:
        because = "there is no interval"
    verdict: Verdict = "undecided" if because else _decide(found)
    if verdict == "undecided" and not because:
        because = "the interval holds 0"
    numbers = {name: getattr(found, name) for name in ("estimate", "low", "high", "value", "null", "n_sets")}
    least, greatest = claim.bounds
    numbers |= {"low": max(found.low, least), "high": min(found.high, greatest)}  # NaN stays, as it comes first
    return {**head, "verdict": verdict, **numbers, "because": because}


def _too_few(found: _Found) -> str:
    if found.estimate != found.estimate:
        return "it is undefined in this run"
    if found.n_sets >= MIN_SETS_TO_TEST:
        return ""
    sets = "one demonstration set" if found.n_sets == 1 else f"{found.n_sets} demonstration sets"
    return f"it is defined behind {sets}, and {MIN_SETS_TO_TEST} are needed (--seeds)"


def _decide(found: _Found) -> Verdict:
    if found.answer:
        answers: dict[str, Verdict] = {"yes": "holds", "no": "does not hold"}
        return answers.get(found.answer, "undecided")
    return "holds" if found.low > 0 else "does not hold" if found.high < 0 else "undecided"


def _does_not_work(known: _Known, run: dict[str, Any], rule: str) -> str:
    """Why a similarity is not interpreted; empty where in-context learning and finetuning are shown to work."""
    table = known.of("findings", run, rule)
    answers = {} if table is None else dict(zip(table["key"], table["answer"], strict=True))
    failed = [words for key, words in _WORKS.items() if answers.get(key) != "yes"]
    return f"it is not shown that {' and that '.join(failed)}" if failed else ""


# ---- what decides -------------------------------------------------------------------------------------------------


def _read(known: _Known, reads: Difference | Answer | Cell, run: dict[str, Any], rule: str) -> _Found | None:
    if isinstance(reads, Answer):
        return _answer(known.of("findings", run, rule), reads)
    if isinstance(reads, Cell):
        return _cell(known.of(reads.table, run, None), reads)
    return _difference(known, reads, run, rule)


def _answer(table: pd.DataFrame | None, reads: Answer) -> _Found | None:
    row = None if table is None else next((r for _, r in table.iterrows() if r["key"] == reads.key), None)
    if row is None:
        return None
    because = str(row["because"]) if isinstance(row["because"], str) else ""
    estimate, low, high = (float(row[name]) for name in ("estimate", "low", "high"))
    return _Found(estimate, low, high, int(row["n_sets"]), because=because, answer=str(row["answer"]))


def _cell(table: pd.DataFrame | None, reads: Cell) -> _Found | None:
    for column, start in reads.where:
        table = None if table is None else table[table[column].str.startswith(start)]
    if table is None or table.empty:
        return None
    row = table.iloc[-1]
    own = f"{reads.column}_low" in row
    low, high = (float(row[f"{reads.column}_{end}" if own else end]) for end in ("low", "high"))
    return _Found(float(row[reads.column]), low, high, int(row["sets"]))


def _difference(known: _Known, reads: Difference, run: dict[str, Any], rule: str) -> _Found | None:
    def of(what: Of) -> pd.DataFrame | None:
        table = known.of("set_means", run, what.rule or rule)
        if table is None:
            return None
        nulls = table["null"].fillna("")
        table = table[(table["quantity"] == what.quantity) & (nulls == what.null)].set_index("set")
        return None if table.empty else table

    value, null = of(reads.value), None if reads.null is None else of(reads.null)
    if value is None or (null is None and reads.null is not None):
        return None
    paired = reads.null is not None and reads.share == 1 and _is_null_of(reads.null, reads.value)
    if null is None:
        numbers = value["value"]
    elif paired:  # the mean of differences: what is undefined in one is left out of both
        numbers = null["excess"]
    else:
        numbers = value["value"] - reads.share * null["value"]
    low_of = None if reads.positive is None else of(reads.positive)
    because = ""
    if low_of is not None and not float(_interval(low_of["value"]).low) > 0:
        because = "there is no similarity to reach: it is not shown to be above 0"
    found = _interval(numbers)
    means = (float(value["value"].mean()), 0.0 if null is None else reads.share * float(null["value"].mean()))
    return _Found(float(found.estimate), float(found.low), float(found.high), int(found.n_defined), *means, because)


def _is_null_of(null: Of, value: Of) -> bool:
    return bool(null.null) and not value.null and (null.quantity, null.rule) == (value.quantity, value.rule)


def _interval(numbers: pd.Series[float]) -> Any:
    values = torch.tensor(numbers.to_numpy(dtype=float))
    return mean_interval(values, sets=torch.arange(len(values)))
