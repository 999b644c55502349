"""The result of `compare`: similarities with their nulls, intervals, predictions."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import FileFormatError, OptionError, UndefinedMetricError
from metaopt_lens._storage import load_result, save_result
from metaopt_lens.analysis._bootstrap import Interval, hierarchical_bootstrap
from metaopt_lens.analysis._multiple import adjust_p_values
from metaopt_lens.analysis._recall import Rec2FTP, rec2ftp
from metaopt_lens.models import ModelInfo

if TYPE_CHECKING:
    import pandas as pd

KIND = "comparison"
Level = Literal["head", "layer"]


@dataclass(frozen=True)
class Statistic:
    """One similarity, for every query, layer and (at head level) head, with what it would be by chance.

    Attributes:
        name: for example ``"z total"``; description: what is compared, in which space.
        values: NaN where undefined. At layer level the head axis has length 1.
        nulls: by name, the same statistic under a null hypothesis, per query (averaged over draws).
    """

    name: str
    description: str
    level: Level
    values: Float[Tensor, "query layer head"]
    nulls: dict[str, Float[Tensor, "query layer head"]]

    @property
    def main_null(self) -> str:
        """The null that the excess is taken over: shuffled where there is one, else the first."""
        return "shuffled" if "shuffled" in self.nulls else next(iter(self.nulls))


@dataclass(frozen=True, repr=False)
class Comparison:
    """In-context updates held against finetuning updates, head by head.

    Attributes:
        model: what was compared.
        statistics: see `compare` for the list.
        sets: which demonstration set each query belongs to.
        norms: by name (``icl``, ``ft``, ``direct``, ``meta_gradient``, ``mass``, ``rank_icl``, ``rank_ft``), per query,
            layer and head.
        gold, zs, icl, ft: index of the correct and of the predicted candidate per query; None without candidates (gold:
            -1 where a query has no label).
        n_demos: demonstrations of each set.
        settings: arguments of `compare`, and of the finetuning.
        provenance: versions and time.
    """

    model: ModelInfo
    statistics: tuple[Statistic, ...]
    sets: Int[Tensor, " query"]
    norms: dict[str, Float[Tensor, "query layer head"]]
    gold: Int[Tensor, " query"] | None
    zs: Int[Tensor, " query"] | None
    icl: Int[Tensor, " query"] | None
    ft: Int[Tensor, " query"] | None
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
    def scope(self) -> str:
        """What the intervals speak about."""
        n = len(self.n_demos)
        return "conditional on these demonstrations" if n == 1 else f"over {n} demonstration sets and their queries"

    def interval(self, values: Float[Tensor, "query ..."], *, level: float = 0.95, n_resamples: int = 2000) -> Interval:
        """Hierarchical bootstrap (demonstration set, then query) of the mean of anything per query."""
        return hierarchical_bootstrap(
            values, sets=self.sets, level=level, n_resamples=n_resamples, seed=int(self.settings["seed"])
        )

    # ---- predictions --------------------------------------------------------------------------------------------

    def accuracies(self, *, level: float = 0.95) -> pd.DataFrame:
        """Accuracy of the three settings and agreement of their predictions, with intervals.

        Raises:
            UndefinedMetricError: no candidates, or no gold labels.
        """
        import pandas as pd

        gold, predictions = self._predictions()
        rows = []
        for name, predicted in predictions.items():
            rows.append((f"accuracy {name}", (predicted == gold).double()))
        for first, second in (("ICL", "FT"), ("ICL", "ZS"), ("FT", "ZS")):
            rows.append((f"agreement {first}-{second}", (predictions[first] == predictions[second]).double()))
        table = []
        for name, values in rows:
            found = self.interval(values, level=level)
            table.append(
                {"quantity": name, "value": float(found.estimate), "low": float(found.low), "high": float(found.high)}
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

    def to_frame(self, *, level: float = 0.95, per_query: bool = False, n_resamples: int = 2000) -> pd.DataFrame:
        """Every statistic at every layer (and head), beside its nulls.

        Columns: ``value`` with its interval ``low``..``high``, ``null: NAME`` for each null, ``excess`` over the main
        null with ``excess_low``..``excess_high``, ``p`` (two-sided t test of the excess over queries, or over
        demonstration sets if there are three or more) and ``p_adjusted`` (Benjamini-Hochberg over all layers and heads
        of the statistic).

        Args:
            per_query: one row per query instead (``value`` and nulls only).
        """
        import pandas as pd

        frames = [
            self._query_frame(s) if per_query else self._summary_frame(s, level, n_resamples) for s in self.statistics
        ]
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

    def _summary_frame(self, statistic: Statistic, level: float, n_resamples: int) -> pd.DataFrame:
        import pandas as pd

        n_layers, n_heads = statistic.values.shape[1:]
        layer, head = (
            g.flatten().numpy() for g in torch.meshgrid(torch.arange(n_layers), torch.arange(n_heads), indexing="ij")
        )
        frame = pd.DataFrame({"statistic": statistic.name, "level": statistic.level, "layer": layer})
        frame["head"] = head if statistic.level == "head" else -1
        defined = self._has_value(statistic.values)
        value = self._interval_where(statistic.values, defined, level, n_resamples)
        frame["value"], frame["low"], frame["high"] = (t.flatten().numpy() for t in value)
        for name, null in statistic.nulls.items():
            frame[f"null: {name}"] = self._interval_where(null, self._has_value(null), level, 1)[0].flatten().numpy()
        excess = statistic.values - statistic.nulls[statistic.main_null]
        defined = self._has_value(excess)
        frame["main_null"] = statistic.main_null
        found = self._interval_where(excess, defined, level, n_resamples)
        frame["excess"], frame["excess_low"], frame["excess_high"] = (t.flatten().numpy() for t in found)
        p = self._p_values(excess).flatten()
        frame["p"] = p
        testable = ~np.isnan(p)
        adjusted = np.full_like(p, np.nan)
        if testable.any():
            adjusted[testable] = adjust_p_values(torch.from_numpy(p[testable])).numpy()
        frame["p_adjusted"] = adjusted
        return frame

    def _has_value(self, values: Tensor) -> Tensor:
        """Whether every demonstration set has a defined value there."""
        groups = [values[self.sets == index] for index in range(len(self.n_demos))]
        return torch.stack([~group.isnan().all(0) for group in groups]).all(0)

    def _interval_where(
        self, values: Tensor, defined: Tensor, level: float, n_resamples: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Estimate, low, high; NaN where some set has no defined value."""
        out = torch.full((3, *defined.shape), torch.nan, dtype=torch.float64)
        if defined.any():
            found = self.interval(values[:, defined], level=level, n_resamples=n_resamples)
            for row, tensor in zip(out, (found.estimate, found.low, found.high), strict=True):
                row[defined] = tensor
        return out[0], out[1], out[2]

    def _p_values(self, excess: Float[Tensor, "query layer head"]) -> np.ndarray[Any, np.dtype[np.float64]]:
        from scipy import stats  # here, as importing it takes half a second

        values = excess.double().numpy()
        if len(self.n_demos) >= 3:  # the sets are what was sampled
            values = np.stack([_nanmean(values[(self.sets == i).numpy()]) for i in range(len(self.n_demos))])
        enough = (~np.isnan(values)).sum(0) >= 2
        p = np.full(values.shape[1:], np.nan)
        if enough.any():
            columns = values[:, enough]
            spread = np.nanstd(columns, axis=0)
            test = stats.ttest_1samp(columns, 0.0, axis=0, nan_policy="omit")
            p[enough] = np.where(spread > 0, np.asarray(test.pvalue, dtype=float), np.nan)
        return p

    def summary(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row per statistic: mean over layers and heads with its interval, nulls, and how many heads stand out.

        ``significant``: layers or heads whose excess over the main null has ``p_adjusted < 1 - level``.
        """
        import pandas as pd

        rows = []
        for statistic in self.statistics:
            mean = statistic.values.nanmean((1, 2))
            excess = (statistic.values - statistic.nulls[statistic.main_null]).nanmean((1, 2))
            row: dict[str, Any] = {"statistic": statistic.name, "level": statistic.level}
            for name, values in (("value", mean), ("excess", excess)):
                usable = values[:, None, None]
                found = self._interval_where(usable, self._has_value(usable), level, 2000)
                row[name] = float(found[0])
                row[f"{name}_low"], row[f"{name}_high"] = float(found[1]), float(found[2])
            row["main_null"] = statistic.main_null
            for name, null in statistic.nulls.items():
                row[f"null: {name}"] = float(null.nanmean())
            p = self._p_values(statistic.values - statistic.nulls[statistic.main_null]).flatten()
            p = p[~np.isnan(p)]
            adjusted = adjust_p_values(torch.from_numpy(p)).numpy() if len(p) else p
            row["significant"] = int((adjusted < 1 - level).sum())
            row["of"] = int(np.prod(statistic.values.shape[1:]))
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, statistic: str = "z total") -> Any:
        """A plotly figure: layer x head map of a statistic, its main null beside it."""
        from metaopt_lens.viz import comparison_map

        return comparison_map(self, statistic)

    # ---- storing ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path.safetensors`` and ``path.json``; returns the latter."""
        tensors: dict[str, Tensor] = {"sets": self.sets}
        tensors |= {f"norms/{name}": t for name, t in self.norms.items()}
        tensors |= {name: t for name in ("gold", "zs", "icl", "ft") if (t := getattr(self, name)) is not None}
        described = []
        for index, s in enumerate(self.statistics):
            tensors[f"statistics/{index}"] = s.values
            tensors |= {f"statistics/{index}/{null}": t for null, t in s.nulls.items()}
            described.append({"name": s.name, "description": s.description, "level": s.level, "nulls": list(s.nulls)})
        meta = {
            "model": dataclasses.asdict(self.model),
            "statistics": described,
            "norms": list(self.norms),
            "n_demos": list(self.n_demos),
            "settings": self.settings,
            "provenance": self.provenance,
        }
        return save_result(path, kind=KIND, tensors=tensors, meta=meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `save` wrote.

        Raises:
            FileFormatError: a file is missing, damaged, or holds something else.
        """
        tensors, meta = load_result(path, kind=KIND)
        try:
            return cls(
                model=ModelInfo(**(meta["model"] | {"processing": tuple(meta["model"]["processing"])})),
                statistics=tuple(
                    Statistic(
                        name=s["name"],
                        description=s["description"],
                        level=s["level"],
                        values=tensors[f"statistics/{index}"],
                        nulls={null: tensors[f"statistics/{index}/{null}"] for null in s["nulls"]},
                    )
                    for index, s in enumerate(meta["statistics"])
                ),
                sets=tensors["sets"],
                norms={name: tensors[f"norms/{name}"] for name in meta["norms"]},
                gold=tensors.get("gold"),
                zs=tensors.get("zs"),
                icl=tensors.get("icl"),
                ft=tensors.get("ft"),
                n_demos=tuple(meta["n_demos"]),
                settings=meta["settings"],
                provenance=meta["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} is not a complete {KIND}: {error!r}.") from None

    def __repr__(self) -> str:
        m = self.model
        lines = [
            f"Comparison of in-context and finetuning updates in {m.name} ({m.n_layers} layers x {m.n_heads} heads)",
            f"  {len(self.sets)} queries behind {len(self.n_demos)} set(s) of {max(self.n_demos)} demonstrations; "
            f"intervals {self.scope}",
        ]
        for row in self.summary().to_dict("records"):
            lines.append(
                f"  {row['statistic']:<28} {row['value']:+.3f} [{row['value_low']:+.3f}, {row['value_high']:+.3f}]"
                f"   {row['main_null']} null {row['null: ' + row['main_null']]:+.3f}"
                f"   {row['significant']} of {row['of']} {row['level']}s above or below it"
            )
        return "\n".join(lines)


def _nanmean(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """nanmean over the first axis, NaN (without a warning) where nothing is defined."""
    defined = ~np.isnan(values)
    count = defined.sum(0)
    total = np.where(defined, values, 0.0).sum(0)
    mean: np.ndarray[Any, np.dtype[np.float64]] = np.full(total.shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return mean
