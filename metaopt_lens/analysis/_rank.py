"""Kendall's tau-b for many pairs of vectors at once, in O(n log² n) each."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from metaopt_lens.analysis._checks import check_finite, check_same_shape
from metaopt_lens.analysis._query_statistic import QueryStatistic

_CHUNK = 1 << 18  # entries worked on at once: bounds the memory and stays in the cache

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


def kendall_tau(first: Float[Tensor, "query *item src"], second: Float[Tensor, "query *item src"]) -> QueryStatistic:
    """Kendall's tau-b (corrected for ties) along the last axis, one number per query (and layer).

    Equal to ``scipy.stats.kendalltau`` on every pair, which is what the published code calls. Where a vector is
    constant tau-b is undefined; scipy gives NaN there, and so does the published mean over the queries, while
    ``.mean()`` leaves the pair out.

    Args:
        first: scores or weights along the last axis.
        second: as many others.
    """
    check_same_shape(first=first, second=second)
    check_finite(first=first, second=second)
    n = first.shape[-1]
    x, y = (t.detach().cpu().double().reshape(-1, n).numpy() for t in (first, second))
    tau = np.full(len(x), np.nan)
    rows = max(1, _CHUNK // max(n, 1))
    if n > 1:  # numpy's vectorised sort is many times faster than torch's
        for start in range(0, len(x), rows):
            tau[start : start + rows] = _tau_b(x[start : start + rows], y[start : start + rows])
    values = torch.from_numpy(tau).reshape(first.shape[:-1]).to(first.device)
    return QueryStatistic(values, "a vector is constant (all entries tied) or has fewer than two entries")


def _tau_b(x: _Floats, y: _Floats) -> _Floats:
    n = x.shape[-1]
    rank_x, tied_x = _dense_rank(x)
    rank_y, tied_y = _dense_rank(y)
    # in order of (x, y), a discordant pair is a strict inversion of y: pairs tied in x stand in order of y
    key = np.sort(rank_x * n + rank_y, axis=-1)
    pairs = n * (n - 1) // 2
    score = pairs - tied_x - tied_y + _tied_pairs(key) - 2 * _inversions(key % n)
    with np.errstate(invalid="ignore"):  # 0/0 stays NaN: undefined
        tau: _Floats = np.clip(score / np.sqrt(pairs - tied_x) / np.sqrt(pairs - tied_y), -1, 1)
    return tau


def _dense_rank(x: _Floats) -> tuple[_Ints, _Ints]:
    """Rank of each entry, equal for ties, and the number of tied pairs of each row."""
    order = np.argsort(x, axis=-1)
    ordered = np.take_along_axis(x, order, -1)
    new = np.zeros(x.shape, dtype=np.int64)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, new.cumsum(-1), -1)
    return rank, _tied_pairs(ordered)


def _tied_pairs(ordered: NDArray[np.generic]) -> _Ints:
    """Pairs of equal entries in each row of sorted numbers."""
    position = np.broadcast_to(np.arange(ordered.shape[-1]), ordered.shape)
    start = np.zeros(ordered.shape, dtype=np.int64)
    start[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], position[:, 1:], 0)
    tied: _Ints = (position - np.maximum.accumulate(start, axis=-1)).sum(-1)  # 0 + 1 + ... + (run - 1)
    return tied


def _inversions(ranks: _Ints) -> _Ints:
    """Pairs i < j with ranks[i] > ranks[j] in each row, by merging sorted blocks."""
    n_rows, n = ranks.shape
    padded = 1 << (n - 1).bit_length()
    place = np.arange(padded)
    # entries carry their position, which breaks ties in its order and tells the half they came from;
    # the filling at the end is larger than every rank and makes no inversion
    entries = np.full((n_rows, padded), n * padded, dtype=np.int64) + place
    entries[:, :n] = ranks * padded + place[:n]
    count = np.zeros(n_rows, dtype=np.int64)
    width = 1
    while width < padded:
        entries.reshape(n_rows, -1, 2 * width).sort(axis=-1)
        from_left = (entries & width) == 0
        moved = from_left.astype(np.float64) @ (place & (2 * width - 1)).astype(np.float64)
        # merged places of the left halves, less those they had: how many right entries went before them
        count += moved.astype(np.int64) - (padded // (2 * width)) * (width * (width - 1) // 2)
        width *= 2
    return count
