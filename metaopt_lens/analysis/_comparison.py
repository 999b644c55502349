"""The result of `compare`: similarities with their nulls, intervals, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._codec import NOT_IN_0_1, NOT_STORED, Stored
from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens._plots import draw
from metaopt_lens.analysis._comparison_tables import accuracy_table, head_frame, query_frame, summary_table
from metaopt_lens.analysis._further import Further
from metaopt_lens.analysis._interval import Interval, mean_interval, scope, set_means, t_test
from metaopt_lens.analysis._label_answers import Answers
from metaopt_lens.analysis._measured import Measured
from metaopt_lens.analysis._recall import Rec2FTP, rec2ftp
from metaopt_lens.analysis._set_table import set_table
from metaopt_lens.analysis._verdict import Finding, findings
from metaopt_lens.finetuning import LearningRateChoice, WeightUpdate
from metaopt_lens.models import ModelInfo

if TYPE_CHECKING:
    import pandas as pd

_OF_0_1 = frozenset({"shuffled", "label-shuffled"})  # nulls under names that meant something else


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Stored):
    """In-context updates compared with finetuning updates, head by head.

    Attributes:
        model: what was compared.
        statistics: see `compare` for the list.
        sets: which demonstration set each query belongs to.
        norms: by name (``icl``, ``ft``, ``direct``, ``meta_gradient``, ``mass``, ``rank_icl``, ``rank_ft``), per query,
            layer and head.
        gold, zs, icl, ft: index of the correct and of the predicted candidate per query; None without candidates (gold:
            -1 where a query has no label).
        flipped_gold: the correct candidate behind flipped labels (-1 where no demonstration shows the query's label).
        controlled: predicted candidates under the controls on labels, one row a draw, named by setting and control:
            ``"ICL, shuffled labels"``, ``"FT, flipped labels"`` and so on.
        n_demos: demonstrations of each set.
        answers: what is answered in the settings ``ZS``, ``ICL`` and ``FT``, also in absolute numbers; empty without
            candidates.
        settings: arguments of `compare`, and of the finetuning.
        provenance: versions and time.
        notes: controls that were left out, and why.
        learning_rate: how it was chosen; None where it was given.
        further: what else was asked of the same prompts (docs/theory.md, section 12); None where it was not.
        updates: what was compared, one per set; not stored in files.
        seconds: what each control that needs further runs took; not stored in files.
    """

    kind: ClassVar[str] = "comparison"

    model: ModelInfo
    statistics: tuple[Measured, ...]
    sets: Int[Tensor, " query"]
    norms: dict[str, Float[Tensor, "query layer head"]]
    gold: Int[Tensor, " query"] | None
    zs: Int[Tensor, " query"] | None
    icl: Int[Tensor, " query"] | None
    ft: Int[Tensor, " query"] | None
    flipped_gold: Int[Tensor, " query"] | None
    controlled: dict[str, Int[Tensor, "draw query"]]
    n_demos: tuple[int, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    answers: dict[str, Answers] = field(default_factory=dict, metadata=NOT_IN_0_1)
    notes: tuple[str, ...] = field(default=(), metadata=NOT_IN_0_1)
    learning_rate: LearningRateChoice | None = field(default=None, metadata=NOT_IN_0_1)
    further: Further | None = field(default=None, metadata=NOT_IN_0_1)
    updates: tuple[WeightUpdate, ...] = field(default=(), metadata=NOT_STORED)
    seconds: dict[str, float] = field(default_factory=dict, metadata=NOT_STORED)

    def __getitem__(self, name: str) -> Measured:
        """The statistic of that name."""
        for statistic in self.statistics:
            if statistic.name == name:
                return statistic
        names = ", ".join(repr(s.name) for s in self.statistics)
        raise OptionError(f"there is no statistic {name!r}; this comparison has {names}.")

    @property
    def n_sets(self) -> int:
        """Demonstration sets."""
        return len(self.n_demos)

    @property
    def scope(self) -> str:
        """What the intervals speak about."""
        return scope(self.n_sets)

    def interval(self, values: Float[Tensor, "query ..."], *, level: float = 0.95) -> Interval:
        """t interval, over demonstration sets, of the mean of anything per query (see `mean_interval`).

        Args:
            values: one value per query.
            level: coverage of the intervals.
        """
        return mean_interval(values, sets=self.sets, level=level)

    def statistic_interval(self, statistic: Measured, values: Float[Tensor, "query ..."], *, level: float) -> Interval:
        """The same for values derived from a statistic: one value a set where the set decides it.

        Args:
            statistic: the statistic.
            values: one value per query, derived from it.
            level: coverage of the intervals.
        """
        if statistic.unit == "query":
            return self.interval(values, level=level)
        means = set_means(values, self.sets)
        return mean_interval(means, sets=torch.arange(len(means)), level=level)

    # ---- predictions --------------------------------------------------------------------------------------------

    def accuracies(self, *, level: float = 0.95) -> pd.DataFrame:
        """Accuracy of every setting and agreement of predictions, with intervals and the number of queries ``n``.

        Behind flipped labels the accuracy stands twice: against the natural and against the flipped labels. Draws of
        shuffled labels are averaged per query. Intervals are cut at 0 and 1.

        Args:
            level: coverage of the intervals.

        Raises:
            UndefinedMetricError: no candidates, or no gold labels.
        """
        return self._table("accuracies", accuracy_table, level)

    def rec2ftp(self) -> Rec2FTP:
        """Recall to finetuning predictions, with its base rate; undefined where finetuning corrected nothing.

        Raises:
            UndefinedMetricError: no candidates, or no gold labels.
        """
        right = self.correct()
        return rec2ftp(right["ZS"], right["ICL"], right["FT"])

    def correct(self) -> dict[str, Bool[Tensor, " query"]]:
        """Whether each query is answered correctly in the settings ``ZS``, ``ICL`` and ``FT``.

        Raises:
            UndefinedMetricError: no candidates, or no gold labels.
        """
        gold, predictions = self.predictions()
        return {name: predicted == gold for name, predicted in predictions.items()}

    def predictions(self) -> tuple[Int[Tensor, " query"], dict[str, Int[Tensor, " query"]]]:
        """The correct candidate of every query, and the predicted ones in the settings ``ZS``, ``ICL`` and ``FT``.

        Raises:
            UndefinedMetricError: no candidates, or no gold labels.
        """
        if self.zs is None or self.icl is None or self.ft is None or self.gold is None:
            raise UndefinedMetricError(
                "there are no predictions: give the prompts candidates (label words), or let compare take them."
            )
        if bool((self.gold < 0).any()):
            missing = int((self.gold < 0).nonzero()[0])
            raise UndefinedMetricError(f"query {missing} has no gold label: set ICLPrompt(..., label=...).")
        return self.gold, {"ZS": self.zs, "ICL": self.icl, "FT": self.ft}

    # ---- tables -------------------------------------------------------------------------------------------------

    def to_frame(self, *, level: float = 0.95, per_query: bool = False) -> pd.DataFrame:
        """Every statistic at every layer (and head), next to its nulls.

        Columns: ``value`` with its interval ``low``..``high``, ``undefined`` of ``queries`` values, ``null: NAME`` for
        each null, ``excess`` over the main null with ``excess_low``..``excess_high``, ``p`` (two-sided t test of the
        excess over demonstration sets; undefined with fewer than three) and ``p_adjusted`` (Benjamini-Hochberg over all
        layers and heads of the statistic).

        Args:
            level: of the intervals.
            per_query: one row per query instead (``value`` and nulls only).
        """
        if per_query:
            return query_frame(self)
        return self._table("heads", head_frame, level)

    def p_values(self, excess: Float[Tensor, " query *item"]) -> Float[Tensor, "*item"]:
        """Two-sided p of the mean being 0, by a t test over demonstration sets; NaN with fewer than three of them.

        Args:
            excess: one value per query, 0 by chance.
        """
        return t_test(set_means(excess, self.sets))

    def summary(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row per statistic: mean over layers and heads with its interval, nulls, and how many heads stand out.

        ``significant``: layers or heads, of those that can be tested (``of``), whose excess over the main null has
        ``p_adjusted < 1 - level`` (Benjamini-Hochberg); missing with fewer than three demonstration sets.
        ``undefined``: values, of all queries, layers and heads (``values``), that are left out.

        Args:
            level: of the intervals.
        """
        return self._table("summary", summary_table, level)

    def set_means(self) -> pd.DataFrame:
        """One row per demonstration set, quantity and null: what intervals over sets are made of.

        Columns: ``set``, ``quantity``, ``null``, ``value``, ``excess``. With an empty ``null`` the value is the mean of
        the quantity over queries, layers and heads; otherwise it is the null's, and ``excess`` the mean of their
        difference. Quantities are the statistics, accuracies, Rec2FTP with its base rate, and further results.
        """
        return set_table(self)

    @cached_property
    def _tables(self) -> dict[tuple[str, float], pd.DataFrame]:
        return {}

    def _table(self, name: str, make: Callable[[Comparison, float], pd.DataFrame], level: float) -> pd.DataFrame:
        """Made once and copied: the intervals of many heads take time."""
        if (name, level) not in self._tables:
            self._tables[name, level] = make(self, level)
        return self._tables[name, level].copy()

    def findings(self, statistic: str = "z total") -> tuple[Finding, ...]:
        """The questions a reader asks first, answered; see `metaopt_lens.analysis.findings`.

        Args:
            statistic: whose similarity is asked about; each of its nulls has a question.
        """
        return findings(self, statistic)

    def plot(self, statistic: str = "z total") -> Any:
        """A plotly figure: layer x head map of a statistic, its main null next to it.

        Args:
            statistic: its name in `statistics`.
        """
        return draw(self, "plot", statistic)

    # ---- storing ------------------------------------------------------------------------------------------------

    @classmethod
    def _refusal(cls, body: Mapping[str, Any]) -> str | None:
        """Files of 0.1 hold nulls under names that meant something else."""
        old = _OF_0_1.intersection(null for statistic in body["statistics"] for null in statistic["nulls"])
        if not old:
            return None
        return f"was written by metaopt-lens 0.1, whose null {min(old)!r} is not what its name says: compare again."

    def __repr__(self) -> str:
        m = self.model
        lines = [
            f"Comparison of in-context and finetuning updates in {m.name} ({m.n_layers} layers x {m.n_heads} heads)",
            f"  {len(self.sets)} queries behind {self.n_sets} set(s) of {max(self.n_demos)} demonstrations; "
            f"intervals {self.scope}: see summary()",
        ]
        for s in self.statistics:
            lines.append(
                f"  {s.name:<28} {float(s.values.nanmean()):+.3f}"
                f"   {s.main_null} null {float(s.nulls[s.main_null].nanmean()):+.3f}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
