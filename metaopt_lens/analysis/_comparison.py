"""The result of `compare`: similarities with their nulls, intervals, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens._plots import draw
from metaopt_lens.analysis._interval import (
    MIN_SETS_TO_TEST,
    Interval,
    mean_interval,
    scope,
    set_means,
    t_test,
)
from metaopt_lens.analysis._multiple import adjust_p_values
from metaopt_lens.analysis._recall import Rec2FTP, rec2ftp
from metaopt_lens.models import ModelInfo

if TYPE_CHECKING:
    import pandas as pd

Level = Literal["head", "layer"]

OTHER_QUERY = "other query"
SHUFFLED_LABELS = "shuffled labels"
FLIPPED_LABELS = "flipped labels"
RANDOM_ROTATION = "rotated"
RANDOM_WEIGHTS = ("random weights", "random weights, trained embeddings")
RESERVED = frozenset(
    {OTHER_QUERY, SHUFFLED_LABELS, FLIPPED_LABELS, RANDOM_ROTATION, "random", "analytic", "chance", *RANDOM_WEIGHTS}
)  # nulls of our own; any other is a user's control
_OF_0_1 = frozenset({"shuffled", "label-shuffled"})  # nulls under names that meant something else


@dataclass(frozen=True)
class Statistic:
    """One similarity, for every query, layer and (at head level) head, with what it would be by chance.

    Attributes:
        name: for example ``"z total"``; description: what is compared, in which space.
        level: at layer level the head axis has length 1.
        unit: ``set`` where the demonstrations decide the value and queries behind them repeat it.
        values: NaN where undefined.
        nulls: by name, the same statistic under a null hypothesis, per query (averaged over draws).
    """

    name: str
    description: str
    level: Level
    unit: Literal["query", "set"]
    values: Float[Tensor, "query layer head"]
    nulls: dict[str, Float[Tensor, "query layer head"]]

    @property
    def main_null(self) -> str:
        """The null that the excess is taken over: another query's update where there is one, else the first."""
        return OTHER_QUERY if OTHER_QUERY in self.nulls else next(iter(self.nulls))

    @property
    def n_undefined(self) -> int:
        """How many values are undefined, and left out of every mean, interval and p value."""
        return int(self.values.isnan().sum())


@dataclass(frozen=True, repr=False)
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
        settings: arguments of `compare`, and of the finetuning.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "comparison"

    model: ModelInfo
    statistics: tuple[Statistic, ...]
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

    def __getitem__(self, name: str) -> Statistic:
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
        """t interval, over demonstration sets, of the mean of anything per query (see `mean_interval`)."""
        return mean_interval(values, sets=self.sets, level=level)

    def statistic_interval(self, statistic: Statistic, values: Float[Tensor, "query ..."], *, level: float) -> Interval:
        """The same for values derived from a statistic: one value a set where the set decides it."""
        if statistic.unit == "query":
            return self.interval(values, level=level)
        means = set_means(values, self.sets)
        return mean_interval(means, sets=torch.arange(len(means)), level=level)

    # ---- predictions --------------------------------------------------------------------------------------------

    def accuracies(self, *, level: float = 0.95) -> pd.DataFrame:
        """Accuracy of every setting and agreement of predictions, with intervals and the number of queries ``n``.

        Behind flipped labels the accuracy stands twice: against the natural and against the flipped labels. Draws of
        shuffled labels are averaged per query. Intervals are cut at 0 and 1.

        Raises:
            UndefinedMetricError: no candidates, or no gold labels.
        """
        import pandas as pd

        gold, predictions = self._predictions()
        rows = [(f"accuracy {name}", (predicted == gold).double()) for name, predicted in predictions.items()]
        for name, predicted in self.controlled.items():
            hits = (predicted == gold).double().mean(0)
            if not name.endswith(FLIPPED_LABELS) or self.flipped_gold is None:
                rows.append((f"accuracy {name}", hits))
                continue
            known = self.flipped_gold >= 0
            follows = (predicted == self.flipped_gold).double().mean(0)
            for against, found in (("natural", hits), ("flipped", follows)):
                rows.append((f"accuracy {name}, against the {against}", torch.where(known, found, torch.nan)))
        for first, second in (("ICL", "FT"), ("ICL", "ZS"), ("FT", "ZS")):
            rows.append((f"agreement {first}-{second}", (predictions[first] == predictions[second]).double()))
        table = []
        for name, values in rows:
            found_ = self.interval(values, level=level)
            table.append(
                {
                    "quantity": name,
                    "value": float(found_.estimate),
                    "low": float(found_.low.clamp(0, 1)),
                    "high": float(found_.high.clamp(0, 1)),
                    "n": int((~values.isnan()).sum()),
                }
            )
        return pd.DataFrame(table)

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
        gold, predictions = self._predictions()
        return {name: predicted == gold for name, predicted in predictions.items()}

    def _predictions(self) -> tuple[Tensor, dict[str, Tensor]]:
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
        import pandas as pd

        frames = [self._query_frame(s) if per_query else self._summary_frame(s, level) for s in self.statistics]
        return pd.concat(frames, ignore_index=True)

    def _query_frame(self, statistic: Statistic) -> pd.DataFrame:
        import pandas as pd

        n, layers, heads = statistic.values.shape
        query, layer, head = (
            g.flatten().numpy()
            for g in torch.meshgrid(torch.arange(n), torch.arange(layers), torch.arange(heads), indexing="ij")
        )
        frame = pd.DataFrame(
            {"statistic": statistic.name, "set": self.sets.numpy()[query], "query": query, "layer": layer}
        )
        frame["head"] = head if statistic.level == "head" else -1
        frame["value"] = statistic.values.flatten().numpy()
        for name, null in statistic.nulls.items():
            frame[f"null: {name}"] = null.flatten().numpy()
        return frame

    def _summary_frame(self, statistic: Statistic, level: float) -> pd.DataFrame:
        import pandas as pd

        n_queries, n_layers, n_heads = statistic.values.shape
        layer, head = (
            g.flatten().numpy() for g in torch.meshgrid(torch.arange(n_layers), torch.arange(n_heads), indexing="ij")
        )
        frame = pd.DataFrame({"statistic": statistic.name, "level": statistic.level, "layer": layer})
        frame["head"] = head if statistic.level == "head" else -1
        value = self.statistic_interval(statistic, statistic.values, level=level)
        frame["value"], frame["low"], frame["high"] = _columns(value)
        frame["undefined"] = statistic.values.isnan().sum(0).flatten().numpy()
        frame["queries"] = n_queries
        for name, null in statistic.nulls.items():
            frame[f"null: {name}"] = _columns(self.statistic_interval(statistic, null, level=level))[0]
        frame["main_null"] = statistic.main_null
        excess = statistic.values - statistic.nulls[statistic.main_null]
        found = self.statistic_interval(statistic, excess, level=level)
        frame["excess"], frame["excess_low"], frame["excess_high"] = _columns(found)
        p = self.p_values(excess)
        frame["p"] = p.flatten().numpy()
        frame["p_adjusted"] = _adjusted(p).flatten().numpy()
        return frame

    def p_values(self, excess: Float[Tensor, " query *item"]) -> Float[Tensor, "*item"]:
        """Two-sided p of the mean being 0, by a t test over demonstration sets; NaN with fewer than three of them."""
        return t_test(set_means(excess, self.sets))

    def summary(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row per statistic: mean over layers and heads with its interval, nulls, and how many heads stand out.

        ``significant``: layers or heads, of those that can be tested (``of``), whose excess over the main null has
        ``p_adjusted < 1 - level`` (Benjamini-Hochberg); missing with fewer than three demonstration sets.
        ``undefined``: values, of all queries, layers and heads (``values``), that are left out.

        Args:
            level: of the intervals.
        """
        import pandas as pd

        rows = []
        for statistic in self.statistics:
            excess = statistic.values - statistic.nulls[statistic.main_null]
            row: dict[str, Any] = {"statistic": statistic.name, "level": statistic.level}
            for name, values in (("value", statistic.values), ("excess", excess)):
                found = self.statistic_interval(statistic, values.nanmean((1, 2)), level=level)
                row[name] = float(found.estimate)
                row[f"{name}_low"], row[f"{name}_high"] = float(found.low), float(found.high)
            row["main_null"] = statistic.main_null
            for name, null in statistic.nulls.items():
                mean = self.statistic_interval(statistic, null.nanmean((1, 2)), level=level).estimate
                row[f"null: {name}"] = float(mean)
            adjusted = _adjusted(self.p_values(excess))
            testable = int((~adjusted.isnan()).sum())
            enough = self.n_sets >= MIN_SETS_TO_TEST
            row["significant"] = int((adjusted < 1 - level).sum()) if enough else None
            row["of"] = testable if enough else None
            row["undefined"], row["values"] = statistic.n_undefined, statistic.values.numel()
            rows.append(row)
        return pd.DataFrame(rows).astype({"significant": "Int64", "of": "Int64"})

    def plot(self, statistic: str = "z total") -> Any:
        """A plotly figure: layer x head map of a statistic, its main null next to it."""
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
        return "\n".join(lines)


_Column = np.ndarray[Any, np.dtype[np.float64]]


def _columns(found: Interval) -> tuple[_Column, _Column, _Column]:
    """Estimate, low and high as columns of a table."""
    low, estimate, high = (t.flatten().numpy() for t in (found.low, found.estimate, found.high))
    return estimate, low, high


def _adjusted(p: Float[Tensor, "*item"]) -> Float[Tensor, "*item"]:
    """p values adjusted by Benjamini-Hochberg over those that there are."""
    known = ~p.isnan()
    adjusted = torch.full_like(p, torch.nan)
    adjusted[known] = adjust_p_values(p[known])
    return adjusted
