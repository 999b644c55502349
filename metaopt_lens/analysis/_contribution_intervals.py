"""Means of logit contributions over queries and demonstration sets, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from metaopt_lens._types import HeadRef
from metaopt_lens.analysis._interval import mean_interval
from metaopt_lens.decomposition import LogitContributionSet

if TYPE_CHECKING:
    import pandas as pd


def contribution_intervals(found: LogitContributionSet, *, level: float = 0.95) -> pd.DataFrame:
    """One row per part of the model: mean contribution with its t interval over the demonstration sets.

    With a single set the interval is over its queries and speaks about these demonstrations only.

    Args:
        found: contributions of several queries.
        level: nominal coverage.

    Returns:
        Columns name (of a head, ``all heads``, ``MLPs``, ...), part, mean, low, high (NaN where undefined), unit and n
        (how many units have a value).
    """
    import pandas as pd

    rows = []

    def row(name: str, part: str, values: Tensor) -> None:
        interval = mean_interval(values.detach().cpu(), sets=found.sets, level=level)
        rows.append(
            {
                "name": name,
                "part": part,
                "mean": float(interval.estimate),
                "low": float(interval.low),
                "high": float(interval.high),
                "unit": interval.unit,
                "n": int(interval.n_defined),
            }
        )

    row("logit", "logit", found.logit)
    row("embedding", "embedding", found.embedding)
    row("MLPs", "mlp", found.mlp.sum(1))
    row("biases", "bias", found.biases)
    for part, values in (("zero_shot", found.zero_shot), ("meta_gradient", found.meta_gradient)):
        row("all heads", part, values.sum((1, 2)))
        for layer in range(values.shape[1]):
            for head in range(values.shape[2]):
                row(str(HeadRef(layer, head)), part, values[:, layer, head])
    return pd.DataFrame(rows)
