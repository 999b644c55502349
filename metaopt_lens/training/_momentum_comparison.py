"""MomentumComparison: what came out of plain and momentum attention, trained in pairs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from metaopt_lens._errors import FileFormatError
from metaopt_lens._storage import provenance, write_text
from metaopt_lens.training._trained_model import TrainedModel
from metaopt_lens.training._training_config import TrainingConfig

if TYPE_CHECKING:
    import pandas as pd

KIND = "momentum comparison"
ARMS = ("plain", "momentum")
# Table in the evaluation -> name, what it is counted by, whether more is better.
METRICS = {
    "perplexity": ("perplexity", "tokens", False),
    "accuracy": ("accuracy", "demos", True),
    "accuracy_of_all": ("accuracy among all labels", "demos", True),
    "accuracy_seen": ("accuracy on seen bindings", "demos", True),
}


@dataclass(frozen=True)
class MomentumComparison:
    """Pairs of runs that differ in momentum alone.

    Attributes:
        config: of the momentum arm; the plain arm has eta = 0.
        seeds: one pair each.
        plain, momentum: the runs, in the order of the seeds.
    """

    config: TrainingConfig
    seeds: tuple[int, ...]
    plain: tuple[TrainedModel, ...]
    momentum: tuple[TrainedModel, ...]

    def runs(self) -> pd.DataFrame:
        """One row per metric, point, seed and arm."""
        import pandas as pd

        rows = [
            {"metric": METRICS[table][0], "by": METRICS[table][1], "at": at, "seed": seed, "arm": arm, "value": value}
            for arm, runs in zip(ARMS, (self.plain, self.momentum), strict=True)
            for seed, run in zip(self.seeds, runs, strict=True)
            for table in METRICS
            for at, value in getattr(run.evaluation, table).items()
        ]
        rows += [
            {"metric": "last training loss", "by": "steps", "at": len(run.losses), "seed": seed, "arm": arm,
             "value": float(np.mean(run.losses[-50:]))}
            for arm, runs in zip(ARMS, (self.plain, self.momentum), strict=True)
            for seed, run in zip(self.seeds, runs, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def history(self) -> pd.DataFrame:
        """Evaluations on the way and at the end: as `runs`, by ``step``."""
        import pandas as pd

        rows = [
            {"metric": name, "by": by, "at": at, "step": step, "seed": seed, "arm": arm, "value": value}
            for arm, runs in zip(ARMS, (self.plain, self.momentum), strict=True)
            for seed, run in zip(self.seeds, runs, strict=True)
            for step, found in [*run.history.items(), (len(run.losses), run.evaluation)]
            for table, (name, by, _) in METRICS.items()
            for at, value in getattr(found, table).items()
        ]
        return pd.DataFrame(rows)

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """Means of both arms and of the paired difference, momentum minus plain, with its t interval over seeds.

        `better` is the arm that the interval favours, empty where it contains 0.

        Args:
            level: coverage of the intervals.
        """
        import pandas as pd

        better = {METRICS[table][0]: METRICS[table][2] for table in METRICS}
        rows = []
        for (metric, by, at), group in self.runs().groupby(["metric", "by", "at"], sort=False):
            pairs = group.pivot(index="seed", columns="arm", values="value")
            difference = (pairs["momentum"] - pairs["plain"]).to_numpy()
            low, high = t_interval(difference, level)
            wins = ""
            if low > 0 or high < 0:
                wins = "momentum" if (low > 0) == better.get(str(metric), False) else "plain"
            rows.append(
                {
                    "metric": metric, "by": by, "at": at,
                    "plain": pairs["plain"].mean(), "momentum": pairs["momentum"].mean(),
                    "difference": difference.mean(), "low": low, "high": high, "better": wins,
                    "seeds": len(difference),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def seconds_per_step(self) -> dict[str, float]:
        """Mean time of a training step, by arm."""
        return {
            arm: float(np.mean([run.seconds / len(run.losses) for run in runs]))
            for arm, runs in zip(ARMS, (self.plain, self.momentum), strict=True)
        }

    def save(self, folder: Path) -> list[Path]:
        """Write ``comparison.json``, ``summary.csv``, ``runs.csv`` and ``history.csv``; returns their paths.

        Args:
            folder: where the files are written.
        """
        body = {
            "kind": KIND,
            "config": self.config.to_dict(),
            "seeds": list(self.seeds),
            "summary": json.loads(self.summary().to_json(orient="records")),
            "eta": [[list(row) for row in run.eta] for run in self.momentum],
            "seconds_per_step": self.seconds_per_step,
            "provenance": provenance(),
        }
        return [
            write_text(folder / "comparison.json", json.dumps(body, indent=1) + "\n"),
            write_text(folder / "summary.csv", self.summary().to_csv(index=False)),
            write_text(folder / "runs.csv", self.runs().to_csv(index=False)),
            write_text(folder / "history.csv", self.history().to_csv(index=False)),
        ]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MomentumComparison:
        """Read a comparison from the folder that `compare_momentum` wrote.

        Args:
            folder: what `save` or `compare_momentum` wrote to.

        Raises:
            FileFormatError: a file is missing or damaged.
        """
        base = Path(folder)
        try:
            body = json.loads((base / "comparison.json").read_text(encoding="utf-8"))
            if body["kind"] != KIND:
                raise KeyError("kind")
            config, seeds = TrainingConfig.from_dict(body["config"]), tuple(body["seeds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{base} holds no finished comparison ({error!r}).") from None
        plain, momentum = (tuple(TrainedModel.load(run_folder(base, arm, seed)) for seed in seeds) for arm in ARMS)
        return cls(config, seeds, plain, momentum)


def t_interval(values: Float[np.ndarray, " item"], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean; NaN for a single value."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return math.nan, math.nan
    half = float(t.ppf(0.5 + level / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(values))
    return mean - half, mean + half


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Where a run of a comparison lies."""
    return folder / "runs" / f"{arm}-seed{seed}"
