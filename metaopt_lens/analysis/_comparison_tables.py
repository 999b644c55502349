"""The tables of a comparison: one row a quantity, a head, a statistic or a query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis._interval import MIN_SETS_TO_TEST, Interval
from metaopt_lens.analysis._measured import Measured
from metaopt_lens.analysis._multiple import adjust_p_values
from metaopt_lens.analysis._null_names import FLIPPED_LABELS

if TYPE_CHECKING:
    import pandas as pd

    from metaopt_lens.analysis._comparison import Comparison

_Column = np.ndarray[Any, np.dtype[np.float64]]


def accuracy_table(comparison: Comparison, level: float) -> pd.DataFrame:
    """See `Comparison.accuracies`.

    Args:
        comparison: with predictions.
        level: of the intervals.
    """
    import pandas as pd

    _, predictions = comparison.predictions()
    rows = [(f"accuracy {name}", hits) for name, hits in hits_by_setting(comparison).items()]
    for first, second in (("ICL", "FT"), ("ICL", "ZS"), ("FT", "ZS")):
        rows.append((f"agreement {first}-{second}", (predictions[first] == predictions[second]).double()))
    table = []
    for name, values in rows:
        interval = comparison.interval(values, level=level)
        table.append(
            {
                "quantity": name,
                "value": float(interval.estimate),
                "low": float(interval.low.clamp(0, 1)),
                "high": float(interval.high.clamp(0, 1)),
                "n": int((~values.isnan()).sum()),
            }
        )
    return pd.DataFrame(table)


def hits_by_setting(comparison: Comparison) -> dict[str, Float[Tensor, " query"]]:
    """Whether each query is answered correctly: zero-shot, in context, finetuned, and under each control of the labels.

    Behind flipped labels twice, against the natural and against the flipped ones; NaN where a label is in no
    demonstration. Draws of shuffled labels are averaged.

    Args:
        comparison: with predictions.

    Raises:
        UndefinedMetricError: no candidates, or no gold labels.
    """
    gold, predictions = comparison.predictions()
    flipped = comparison.flipped_gold
    rows = {name: (predicted == gold).double() for name, predicted in predictions.items()}
    for name, predicted in comparison.controlled.items():
        hits = (predicted == gold).double().mean(0)
        if not name.endswith(FLIPPED_LABELS) or flipped is None:
            rows[name] = hits
            continue
        follows = (predicted == flipped).double().mean(0)
        for against, found in (("natural", hits), ("flipped", follows)):
            rows[f"{name}, against the {against}"] = torch.where(flipped >= 0, found, torch.nan)
    return rows


def query_frame(comparison: Comparison) -> pd.DataFrame:
    """One row per query, layer and head: values and nulls.

    Args:
        comparison: any.
    """
    import pandas as pd

    return pd.concat([_queries(comparison, s) for s in comparison.statistics], ignore_index=True)


def _queries(comparison: Comparison, statistic: Measured) -> pd.DataFrame:
    import pandas as pd

    query, layer, head = _grid(*statistic.values.shape)
    frame = pd.DataFrame(
        {"statistic": statistic.name, "set": comparison.sets.numpy()[query], "query": query, "layer": layer}
    )
    frame["head"] = head if statistic.level == "head" else -1
    frame["value"] = statistic.values.flatten().numpy()
    for name, null in statistic.nulls.items():
        frame[f"null: {name}"] = null.flatten().numpy()
    return frame


def head_frame(comparison: Comparison, level: float) -> pd.DataFrame:
    """One row per layer and head, with intervals; see `Comparison.to_frame`.

    Args:
        comparison: any.
        level: of the intervals.
    """
    import pandas as pd

    return pd.concat([_heads(comparison, s, level) for s in comparison.statistics], ignore_index=True)


def _heads(comparison: Comparison, statistic: Measured, level: float) -> pd.DataFrame:
    import pandas as pd

    n_queries, *sizes = statistic.values.shape
    layer, head = _grid(*sizes)
    frame = pd.DataFrame({"statistic": statistic.name, "level": statistic.level, "layer": layer})
    frame["head"] = head if statistic.level == "head" else -1
    value = comparison.statistic_interval(statistic, statistic.values, level=level)
    frame["value"], frame["low"], frame["high"] = _columns(value)
    frame["undefined"] = statistic.values.isnan().sum(0).flatten().numpy()
    frame["queries"] = n_queries
    for name, null in statistic.nulls.items():
        frame[f"null: {name}"] = _columns(comparison.statistic_interval(statistic, null, level=level))[0]
    frame["main_null"] = statistic.main_null
    found = comparison.statistic_interval(statistic, statistic.excess, level=level)
    frame["excess"], frame["excess_low"], frame["excess_high"] = _columns(found)
    p = comparison.p_values(statistic.excess)
    frame["p"] = p.flatten().numpy()
    frame["p_adjusted"] = _adjusted(p).flatten().numpy()
    return frame


def summary_table(comparison: Comparison, level: float) -> pd.DataFrame:
    """One row per statistic; see `Comparison.summary`.

    Args:
        comparison: any.
        level: of the intervals.
    """
    import pandas as pd

    rows = [_summary(comparison, statistic, level) for statistic in comparison.statistics]
    return pd.DataFrame(rows).astype({"significant": "Int64", "of": "Int64"})


def _summary(comparison: Comparison, statistic: Measured, level: float) -> dict[str, Any]:
    def mean(values: Tensor) -> Interval:
        return comparison.statistic_interval(statistic, values.nanmean((1, 2)), level=level)

    row: dict[str, Any] = {"statistic": statistic.name, "level": statistic.level}
    for name, values in (("value", statistic.values), ("excess", statistic.excess)):
        found = mean(values)
        row[name], row[f"{name}_low"], row[f"{name}_high"] = map(float, (found.estimate, found.low, found.high))
    row["main_null"] = statistic.main_null
    row |= {f"null: {name}": float(mean(null).estimate) for name, null in statistic.nulls.items()}
    adjusted = _adjusted(comparison.p_values(statistic.excess))
    enough = comparison.n_sets >= MIN_SETS_TO_TEST
    row["significant"] = int((adjusted < 1 - level).sum()) if enough else None
    row["of"] = int((~adjusted.isnan()).sum()) if enough else None
    row["undefined"], row["values"] = statistic.n_undefined, statistic.values.numel()
    return row


def _grid(*sizes: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """The index of every entry along each axis."""
    return [g.flatten().numpy() for g in torch.meshgrid(*map(torch.arange, sizes), indexing="ij")]


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
