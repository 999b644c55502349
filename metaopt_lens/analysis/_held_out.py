"""What a family of maps could do on queries it was not fitted on: ridge regression, cross-validated.

``dW = argmin sum_k |t_k - x_k dW|^2 + lambda |dW|^2`` on the fitting folds, ``x dW`` on the fold left out. lambda is
chosen
on the fitting folds alone, each of them left out in turn. So with targets that have nothing to do with the inputs (and
whose signs are arbitrary) the expected held-out R^2 is at most 0, whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis._interval import Interval, mean_interval
from metaopt_lens.analysis._similarity import cosine

N_FOLDS = 5
MIN_FOLDS = 3  # one left out, one to choose lambda on, one to fit
# lambda over the mean square of an input: from interpolation to nothing but 0.
RIDGES = tuple(10.0**exponent for exponent in range(-12, 5, 2))


@dataclass(frozen=True, eq=False)
class Explained:
    """How much of a target some predictions explain, query by query.

    Attributes:
        sizes: squared norm of the target; NaN where it is undefined.
        errors: squared norm of target minus prediction, by the predictor's name.
        cosines: of target and prediction; NaN where the prediction is 0.
    """

    sizes: Float[Tensor, "query layer site"]
    errors: Mapping[str, Float[Tensor, "query layer site"]]
    cosines: Mapping[str, Float[Tensor, "query layer site"]]

    def r_squared(self, name: str, sets: Int[Tensor, " query"]) -> Float[Tensor, "query layer site"]:
        """``R^2 = 1 - sum_k |t_k - p_k|^2 / sum_k |t_k|^2`` of each demonstration set, as a mean over its queries.

        Args:
            name: of a predictor.
            sets: the demonstration set of each query.

        Raises:
            OptionError: no such predictor.
        """
        if name not in self.errors:
            raise OptionError(f"there is no predictor {name!r}: choose one of {', '.join(self.errors)}.")
        return 1 - ratio_values(self.errors[name], self.sizes, sets)

    def interval(self, name: str, sets: Int[Tensor, " query"], *, layer: int | None = None) -> Interval:
        """t interval of the mean R^2 over all sites (heads, key-value groups, ...) of a layer, or of all layers.

        Args:
            name: of a predictor.
            sets: the demonstration set of each query.
            layer: counted from 0; None for all.
        """
        values = self.r_squared(name, sets)
        return mean_interval((values if layer is None else values[:, [layer]]).nanmean((1, 2)), sets=sets)

    def cosine(self, name: str, sets: Int[Tensor, " query"], *, layer: int | None = None) -> Interval:
        """The same of the mean cosine.

        Args:
            name: of a predictor.
            sets: the demonstration set of each query.
            layer: counted from 0; None for all.
        """
        values = self.cosines[name]
        return mean_interval((values if layer is None else values[:, [layer]]).nanmean((1, 2)), sets=sets)


def ratio_values(
    above: Float[Tensor, " query *item"], below: Float[Tensor, " query *item"], sets: Int[Tensor, " query"]
) -> Float[Tensor, " query *item"]:
    """The ratio of sums over the queries of each demonstration set, as a mean over its queries.

    A ratio of sums has no value for a single query. Its linearisation has, ``r + (above_k - r below_k) / mean below``:
    its mean over the set's queries is the ratio r itself, and its spread is that of r (delta method).

    Args:
        above: what is summed above; NaN is left out.
        below: what is summed below.
        sets: the demonstration set of each query.
    """
    values = torch.full_like(below, torch.nan)
    for number in sorted(set(sets.tolist())):
        rows = sets == number
        over, under = above[rows], below[rows]
        mean = under.nanmean(0)
        ratio = over.nanmean(0) / mean
        values[rows] = ratio + (over - ratio * under) / mean
    return values


def explained(
    target: Float[Tensor, "query layer site *out"],
    predictions: Mapping[str, Float[Tensor, "query layer site *out"]],
    defined: Tensor | None = None,
) -> Explained:
    """Compare predictions with their target.

    Args:
        target: one vector (or several rows of one) for each query, layer and site.
        predictions: by name.
        defined: where the target is more than rounding; everywhere if not given.
    """
    flat = target.double().flatten(3)
    known = torch.ones(flat.shape[:3], dtype=torch.bool) if defined is None else defined
    errors, cosines = {}, {}
    for name, prediction in predictions.items():
        guess = prediction.double().flatten(3)
        errors[name] = torch.where(known, (flat - guess).square().sum(-1), torch.nan)
        cosines[name] = torch.where(known, cosine(flat, guess), torch.nan)
    return Explained(torch.where(known, flat.square().sum(-1), torch.nan), errors, cosines)


def join_explained(parts: Iterable[Explained]) -> Explained:
    """Those of successive groups of queries.

    Args:
        parts: one for each group; predictors that not every one has are left out.
    """
    found = list(parts)

    def joined(which: str) -> dict[str, Tensor]:
        shared = [name for name in found[0].errors if all(name in part.errors for part in found)]
        return {name: torch.cat([getattr(part, which)[name] for part in found]) for name in shared}

    return Explained(torch.cat([part.sizes for part in found]), joined("errors"), joined("cosines"))


def reordered(item: Explained, order: Int[Tensor, " query"]) -> Explained:
    """With its queries in another order.

    Args:
        item: whose queries.
        order: where each of them was.
    """
    return Explained(
        item.sizes[order],
        {name: t[order] for name, t in item.errors.items()},
        {name: t[order] for name, t in item.cosines.items()},
    )


def check_folds(n_folds: int, n_units: Iterable[int], *, what: str) -> None:
    """Require enough of what is left out in turn.

    Args:
        n_folds: how many parts it is left out in.
        n_units: how many there are, in each demonstration set if they are queries.
        what: it is, in the plural, and where: ``"queries behind every demonstration set"``.

    Raises:
        OptionError: fewer than three folds. PromptError: fewer units than folds.
    """
    if n_folds < MIN_FOLDS:
        raise OptionError(
            f"n_folds must be at least {MIN_FOLDS}, got {n_folds}: one fold is left out, one chooses the ridge, the "
            "others are fitted on."
        )
    fewest = min(n_units)
    if fewest < n_folds:
        raise PromptError(
            f"cross-validation in {n_folds} folds needs at least {n_folds} {what}, got {fewest}: give "
            f"{n_folds - fewest} more, or n_folds={max(fewest, MIN_FOLDS)}"
            + ("." if fewest >= MIN_FOLDS else f" and {MIN_FOLDS} of them.")
        )


def held_out_predictions(
    inputs: Float[Tensor, "*batch unit row d_in"],
    targets: Float[Tensor, "*batch unit row d_out"],
    folds: Int[Tensor, " unit"],
) -> Float[Tensor, "*batch unit row d_out"]:
    """What linear maps fitted on the other folds say of every unit, in float64; one map and one lambda a batch entry.

    Args:
        inputs: one or several rows for each unit (a query, with the heads that share a map).
        targets: what they are mapped to.
        folds: the fold of each unit, numbered from 0; three at least.
    """
    x, t = inputs.double(), targets.double()
    names = sorted(set(folds.tolist()))
    ridges = torch.tensor(RIDGES, dtype=x.dtype)
    scores = {name: torch.zeros(()).to(x) for name in names}  # of every lambda, on the fitting folds
    for pair in combinations(names, 2):
        left = [(folds == name).nonzero()[:, 0] for name in pair]
        fit = ((folds != pair[0]) & (folds != pair[1])).nonzero()[:, 0]
        for own, other in ((0, 1), (1, 0)):  # fold `other` judges for fold `own`
            at = left[other]
            error = (_predict(x, t, fit, at, ridges) - _rows(t, at)).square().sum((-1, -2))  # ridge *batch
            scores[pair[own]] = scores[pair[own]] + error
    found = torch.zeros_like(t)
    for name in names:
        at, fit = (folds == name).nonzero()[:, 0], (folds != name).nonzero()[:, 0]
        best = scores[name].argmin(0)  # *batch
        made = _predict(x, t, fit, at, ridges[best][None])[0]
        found[..., at, :, :] = made.reshape(found[..., at, :, :].shape)  # *batch unit row d_out
    return found


def _rows(values: Tensor, units: Tensor) -> Tensor:
    return values[..., units, :, :].flatten(-3, -2)  # *batch (unit row) d


def _predict(x: Tensor, t: Tensor, fit: Tensor, at: Tensor, ridges: Tensor) -> Tensor:
    """Predictions at some units from ridge regressions on others, ``[ridge, *batch, unit row, d_out]``.

    ``ridges`` is one list for the whole batch, ``[ridge]``, or ``[ridge, *batch]``.
    """
    known = _rows(x, fit)
    u, s, vh = torch.linalg.svd(known, full_matrices=False)
    mean_square = s.square().sum(-1) / known.shape[-2]  # *batch
    weights = ridges.reshape(-1, *[1] * mean_square.ndim) if ridges.ndim == 1 else ridges
    penalty = (weights * mean_square)[..., None]  # ridge *batch 1
    gain = torch.where(s > 0, s / (s.square() + penalty), 0.0)  # 0 / 0 where all inputs are 0
    found: Tensor = ((_rows(x, at) @ vh.mT) * gain[..., None, :]) @ (u.mT @ _rows(t, fit))
    return found


def held_out_scale(
    directions: Float[Tensor, "*batch unit direction d_out"],
    targets: Float[Tensor, "*batch unit d_out"],
    folds: Int[Tensor, " unit"],
) -> Float[Tensor, "*batch unit d_out"]:
    """``sum_p gamma_p f_p``: held-out predictions with one number for each direction.

    Args:
        directions: the f_p of each unit.
        targets: what they should add up to.
        folds: as for `held_out_predictions`.
    """
    return held_out_predictions(directions.mT, targets[..., None], folds)[..., 0]


def held_out_mean(
    targets: Float[Tensor, "*batch unit row d_out"], folds: Int[Tensor, " unit"]
) -> Float[Tensor, "*batch unit row d_out"]:
    """The mean of the other folds' targets: what one constant vector would do.

    Args:
        targets: of all units.
        folds: the fold of each.
    """
    return held_out_predictions(torch.ones_like(targets[..., :1]), targets, folds)
