"""Recall of finetuning by in-context learning: of predictions (Rec2FTP) and of the top-k attended tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._errors import OptionError, UndefinedMetricError
from metaopt_lens.analysis._checks import check_finite, check_positive, check_same_shape
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._query_statistic import QueryStatistic


@dataclass(frozen=True)
class Rec2FTP:
    """Of the queries that finetuning corrects, the share (in percent) that in-context learning corrects too.

    Attributes:
        both: queries wrong zero-shot and right both finetuned and in context.
        ft: queries wrong zero-shot and right finetuned (the denominator).
        icl: queries wrong zero-shot and right in context.
        zs_wrong: queries wrong zero-shot.
        n_queries: all queries.
    """

    both: int
    ft: int
    icl: int
    zs_wrong: int
    n_queries: int

    @property
    def value(self) -> float | None:
        """The percentage, or None if finetuning corrected nothing."""
        return self.both / self.ft * 100 if self.ft else None

    @property
    def base_rate(self) -> float | None:
        """100 P(ICL right | zero-shot wrong): what Rec2FTP is if finetuning tells nothing about ICL."""
        return self.icl / self.zs_wrong * 100 if self.zs_wrong else None

    def interval(self, *, level: float = 0.95) -> tuple[float, float] | None:
        """Exact (Clopper-Pearson) interval of `value` in percent, from its counts; None where there is no value.

        Queries count as independent: with demonstration sets that differ, the truth is less certain than this.

        Args:
            level: nominal coverage.
        """
        return exact_interval(self.both, self.ft, level=level)

    @property
    def text(self) -> str:
        """Value and base rate with their counts and exact 95 % intervals."""
        value = f"undefined ({self.undefined})" if self.undefined else _percent(self.both, self.ft)
        base = _percent(self.icl, self.zs_wrong) if self.zs_wrong else "undefined (no query is wrong zero-shot)"
        return f"{value}; base rate {base}"

    @property
    def undefined(self) -> str | None:
        """Why there is no value; None if there is one."""
        if self.ft:
            return None
        return f"finetuning corrected none of the {self.zs_wrong} queries that were wrong zero-shot"

    def require(self) -> float:
        """The percentage, or `UndefinedMetricError`."""
        if self.value is None:
            raise UndefinedMetricError(
                f"Rec2FTP is undefined: {self.undefined} ({self.n_queries} queries in all). "
                "Use more queries, or a finetuning that changes predictions."
            )
        return self.value


def exact_interval(k: int, n: int, *, level: float = 0.95) -> tuple[float, float] | None:
    """Clopper-Pearson interval, in percent, of a share of which k of n were seen; None if n is 0.

    Args:
        k: how many have the property.
        n: of how many.
        level: nominal coverage.
    """
    from scipy.stats import beta  # here, as importing it takes half a second

    if n == 0:
        return None
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k > 0 else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return 100 * low, 100 * high


def _percent(k: int, n: int) -> str:
    found = exact_interval(k, n)
    assert found is not None
    return f"{100 * k / n:.1f} % ({k} of {n}; {found[0]:.1f} % to {found[1]:.1f} %)"


def rec2ftp(
    zs_correct: Bool[Tensor, " query"],
    icl_correct: Bool[Tensor, " query"],
    ft_correct: Bool[Tensor, " query"],
) -> Rec2FTP:
    """Rec2FTP, with the base rate without which it cannot be read.

    Where finetuning corrected nothing, the result has ``value`` None and says why in ``undefined``. The published code
    divides by zero and stops there, as `Rec2FTP.require` does.

    Args:
        zs_correct: which queries are right zero-shot.
        icl_correct: in context.
        ft_correct: finetuned.
    """
    check_same_shape(zs_correct=zs_correct, icl_correct=icl_correct, ft_correct=ft_correct)
    wrong = ~zs_correct
    return Rec2FTP(
        both=int((wrong & ft_correct & icl_correct).sum()),
        ft=int((wrong & ft_correct).sum()),
        icl=int((wrong & icl_correct).sum()),
        zs_wrong=int(wrong.sum()),
        n_queries=len(zs_correct),
    )


@dataclass(frozen=True)
class TopKRecall:
    """Overlap of the k largest entries of two vectors, as a fraction of k.

    Attributes:
        per_query: one number per query (and layer).
        k: how many entries count as top.
        n: how many there are to choose from.
    """

    per_query: QueryStatistic
    k: int
    n: int

    @property
    def chance(self) -> float:
        """Expected recall of a random choice of k entries: k / n."""
        return self.k / self.n


def topk_recall(
    first: Float[Tensor, "query *item src"],
    second: Float[Tensor, "query *item src"],
    *,
    k: int,
    convention: Convention = Convention.DEFAULT,
) -> TopKRecall:
    """Recall of the top k of `second` by the top k of `first`, at token or at example level.

    The published random baseline draws indices with replacement; ``chance`` is its expectation.

    Args:
        first: scores or weights along the last axis.
        second: as many others.
        k: how many entries count as top.
        convention: its `shares_ties` is used.

    Raises:
        OptionError: fewer than k entries.
    """
    check_same_shape(first=first, second=second)
    check_finite(first=first, second=second)
    check_positive(k=k)
    n = first.shape[-1]
    if k > n:
        raise OptionError(
            f"top-{k} recall needs at least {k} entries, but there are only {n}: "
            f"choose k <= {n}, or use more demonstrations."
        )
    member = _membership if convention.shares_ties else _published_membership
    values = (member(first, k) * member(second, k)).sum(-1) / k
    return TopKRecall(QueryStatistic(values, "never"), k=k, n=n)


def _membership(x: Tensor, k: int) -> Tensor:
    """Probability of each entry to be among the top k when ties are broken at random."""
    threshold = x.topk(k, dim=-1).values[..., -1:]
    above, level = x > threshold, x == threshold
    share = (k - above.sum(-1, keepdim=True)).double() / level.sum(-1, keepdim=True)
    return above.double() + level * share


def _published_membership(x: Tensor, k: int) -> Tensor:
    top = np.argsort(-x.detach().cpu().double().numpy(), axis=-1)[..., :k]
    return torch.zeros(x.shape, dtype=torch.float64).scatter_(-1, torch.from_numpy(top), 1.0)
