"""How many heads, added in rank order, give back a share of the in-context gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError, UndefinedMetricError

Unit = Literal["held-out queries", "demonstration sets"]
_LEVEL = 0.95


@dataclass(frozen=True)
class Recovery:
    """The recovery curve, and where it crosses a share of the gain upwards for the last time.

    Attributes:
        share: what was asked for.
        n_heads: the smallest number of heads from which on the curve stays at or above `share`.
        low, high: 95 % interval of `n_heads`; None where it cannot be known, and `note` says why.
        curve: share of the gain that the first n heads give, mean over the units, n from 0 to all.
        n_units, unit: what the interval is taken over.
        note: what the interval speaks about, or why there is none.
    """

    share: float
    n_heads: int
    low: int | None
    high: int | None
    curve: Float[Tensor, " n_added"]
    n_units: int
    unit: Unit
    note: str


def recovery(added: Float[Tensor, "unit n_added"], share: float, unit: Unit) -> Recovery:
    """Last upward crossing of the recovery curve, with an interval.

    The curve need not be monotone, so that the first crossing says little. The interval inverts t tests of
    ``metric(n) - metric(0) - share * gain`` (after Fieller, so that no ratio has to be resampled): `low` is one above
    the last n at which the curve is surely below `share`, `high` one above the last n at which it is not surely at or
    above it.

    Args:
        added: the metric with the first n heads' meta-gradients in place, n from 0 to all, of units on which the heads
            were **not** ranked: held-out queries behind the same demonstrations, or means of whole demonstration sets.
        share: of the gain, above 0 and at most 1.
        unit: what the rows are.

    Raises:
        OptionError: a share outside (0, 1].
        UndefinedMetricError: no units, or units on which the demonstrations change nothing.
    """
    if not 0 < share <= 1:
        raise OptionError(f"share must lie above 0 and at most at 1, got {share}.")
    n_units = len(added)
    if n_units == 0:
        raise UndefinedMetricError(
            "how many heads recover the gain is not defined for a single query: heads are ranked on some queries and "
            "the recovery is measured on others, so give at least two."
        )
    changed = added.double() - added[:, :1].double()
    gain = changed[:, -1]
    mean_gain = float(gain.mean())
    if mean_gain == 0:
        raise UndefinedMetricError("the demonstrations do not change the metric: there is no gain to recover.")
    above = (changed - share * gain[:, None]) * (1.0 if mean_gain > 0 else -1.0)
    rounding = 1e-9 * abs(mean_gain)
    middle = above.mean(0)
    low = high = None
    if n_units == 1:
        note = f"one of the {unit} alone gives no interval"
    else:
        half = _half_width(above)
        # At n = 0 the difference is the gain itself, less a factor.
        if float(middle[0] + half[0]) >= 0:
            note = f"no interval: over {n_units} {unit} the gain itself is not shown to differ from 0"
        else:
            low, high = _crossing(middle + half, rounding), _crossing(middle - half, rounding)
            note = f"95 % interval over {n_units} {unit}"
    if unit == "held-out queries":
        note += ", conditional on these demonstrations"
    return Recovery(
        share=share,
        n_heads=_crossing(middle, rounding),
        low=low,
        high=high,
        curve=changed.mean(0) / mean_gain,
        n_units=n_units,
        unit=unit,
        note=note,
    )


def _crossing(above: Float[Tensor, " n_added"], rounding: float) -> int:
    """One above the last n that lies below 0."""
    below = (above < -rounding).nonzero()[:, 0]
    return min(int(below[-1]) + 1, len(above) - 1) if len(below) else 0


def _half_width(values: Float[Tensor, "unit n_added"]) -> Float[Tensor, " n_added"]:
    """Half the t interval of the mean over units."""
    from scipy.stats import t  # here, as importing it takes half a second

    n = len(values)
    quantile = float(t.ppf(0.5 + _LEVEL / 2, n - 1))
    half: Tensor = values.std(0, correction=1) * (quantile / n**0.5)
    return half


def split_queries(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Queries to rank heads on and queries to measure the recovery on: disjoint halves, drawn from a seed.

    A single query is ranked on, and nothing is left to measure on.
    """
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = max(1, n // 2)
    return sorted(drawn[:cut]), sorted(drawn[cut:])
