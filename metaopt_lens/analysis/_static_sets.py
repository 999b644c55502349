"""Static patches behind several demonstration sets, and their comparison with finetuning: t intervals over the sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._interval import Interval, mean_interval, scope
from metaopt_lens.analysis._patch_against_finetuning import (
    FINETUNED,
    PatchAgainstFinetuning,
    own_updates,
    patch_against_finetuning,
)
from metaopt_lens.analysis._static_curve import StaticCurve, gain_sentence
from metaopt_lens.models import wrap

if TYPE_CHECKING:
    import pandas as pd

_ALL = "all"  # matrices


@dataclass(frozen=True, eq=False)
class StaticAnswers:
    """What is kept of a static curve: right or wrong, and how far from the in-context and the zero-shot answer.

    Attributes:
        settings: in context, zero-shot, then with each static patch.
        correct: whether each query is answered right, see `StaticCurve`.
        divergences: see `StaticCurve`.
    """

    settings: tuple[str, ...]
    correct: Bool[Tensor, "setting query"]
    divergences: dict[str, Float[Tensor, "setting query"]]

    @classmethod
    def of(cls, curve: StaticCurve) -> StaticAnswers:
        """Those of a curve.

        Args:
            curve: of one demonstration set.
        """
        return cls(curve.settings, curve.correct, curve.divergences)

    def only(self, settings: Sequence[str]) -> StaticAnswers:
        """Some of the settings.

        Args:
            settings: their names.
        """
        rows = [self.settings.index(name) for name in settings]
        kept = {name: values[rows] for name, values in self.divergences.items()}
        return StaticAnswers(tuple(settings), self.correct[rows], kept)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        divergences = {name: values.tolist() for name, values in self.divergences.items()}
        return {"settings": list(self.settings), "correct": self.correct.tolist(), "divergences": divergences}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> StaticAnswers:
        """The reverse of `to_dict`.

        Args:
            body: what `to_dict` gave; further fields are not read.
        """
        divergences = {name: torch.tensor(values).double() for name, values in body["divergences"].items()}
        return cls(tuple(body["settings"]), torch.tensor(body["correct"]), divergences)


def static_table(sets: Sequence[StaticAnswers]) -> pd.DataFrame:
    """One row for every setting: accuracy, gain over zero-shot, both divergences, with intervals over the sets.

    Args:
        sets: of each demonstration set, with the same settings, zero-shot the second.
    """
    import pandas as pd

    rows = []
    for number, name in enumerate(sets[0].settings):
        right = [one.correct[number].double() for one in sets]
        gain = [own - one.correct[1].double() for own, one in zip(right, sets, strict=True)]
        row: dict[str, Any] = {"setting": name, "sets": len(sets), "n": sum(map(len, right))}
        row |= _numbers("accuracy", over_sets(right).within(0.0, 1.0))
        row |= _numbers("gain", over_sets(gain).within(-1.0, 1.0))
        for key in sets[0].divergences:
            found = over_sets([one.divergences[key][number] for one in sets])
            row |= _numbers(key, found.within(0.0, torch.inf))
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class StaticCurves:
    """Static curves behind several demonstration sets, with the same settings.

    Attributes:
        sets: one curve for each.

    Raises:
        OptionError: no curves, or curves of other settings.
    """

    sets: tuple[StaticCurve, ...]

    def __post_init__(self) -> None:
        if len({(curve.n_fit, curve.ridge) for curve in self.sets}) != 1:
            raise OptionError("static curves are joined where all have the same n_fit and ridge, and there is one.")

    def to_frame(self) -> pd.DataFrame:
        """One row for every setting: accuracy, gain over zero-shot, both divergences, with intervals over the sets."""
        return static_table([StaticAnswers.of(curve) for curve in self.sets])

    @property
    def sentence(self) -> str:
        """Whether the last patch beats zero-shot, by the interval of the paired difference."""
        gain = over_sets([curve.correct[-1].double() - curve.correct[1].double() for curve in self.sets])
        return gain_sentence(gain.within(-1.0, 1.0), self.sets[0].n_fit[-1])


@dataclass(frozen=True, eq=False)
class PatchesAgainstFinetuning:
    """Static patches and finetuning of the same matrices, behind one demonstration set or more.

    Attributes:
        sets: the comparison behind each.
    """

    sets: tuple[PatchAgainstFinetuning, ...]

    @property
    def cosines(self) -> dict[str, Float[Tensor, "demo_set layer matrix"]]:
        """With the finetuned update, then with every null's (mean over its draws); NaN where a set has no such null."""
        found = {FINETUNED: torch.stack([one.cosine for one in self.sets])}
        nothing = torch.full_like(self.sets[0].cosine, torch.nan)
        for name in dict.fromkeys(name for one in self.sets for name in one.nulls):
            of_sets = [one.nulls[name].mean(0) if name in one.nulls else nothing for one in self.sets]
            found[name] = torch.stack(of_sets)
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row per update and matrix: cosine with the patch's change, and by how much the finetuned one exceeds it.

        Means over layers; 95 % t intervals over the demonstration sets, none for a single one. ``"all"`` is the mean
        over the matrices.
        """
        import pandas as pd

        cosines, rows = self.cosines, []
        for name, values in cosines.items():
            excess = cosines[FINETUNED] - values
            matrices = self.sets[0].matrices
            for matrix in (*matrices, _ALL):
                chosen = [i for i, other in enumerate(matrices) if matrix in (other, _ALL)]
                row: dict[str, Any] = {"update": name, "matrix": matrix, "sets": len(self.sets)}
                row |= _numbers("cosine", _of_sets(values[..., chosen]).within(-1.0, 1.0))
                if name != FINETUNED:
                    row |= _numbers("excess", _of_sets(excess[..., chosen]).within(-2.0, 2.0))
                rows.append(row)
        return pd.DataFrame(rows)

    def accuracy_frame(self) -> pd.DataFrame:
        """One row per setting: accuracy on the held-out queries, and gain over zero-shot; nulls are means over draws.

        95 % t intervals over the demonstration sets; of a single one, over its queries.
        """
        import pandas as pd

        settings: dict[str, list[Tensor]] = {}
        gains: dict[str, list[Tensor]] = {}
        for one in self.sets:
            zero_shot = one.correct["zero-shot"].double()
            null_correct = {f"{FINETUNED}, {name}": draws.double().mean(0) for name, draws in one.null_correct.items()}
            for name, right in {**one.correct, **null_correct}.items():
                settings.setdefault(name, []).append(right.double())
                gains.setdefault(name, []).append(right.double() - zero_shot)
        rows = []
        for name, values in settings.items():
            row: dict[str, Any] = {"setting": name, "sets": len(values), "n": sum(map(len, values))}
            row |= _numbers("accuracy", over_sets(values).within(0.0, 1.0))
            rows.append(row | _numbers("gain", over_sets(gains[name]).within(-1.0, 1.0)))
        return pd.DataFrame(rows)

    @property
    def sentence(self) -> str:
        """Whether both changes point the same way, more than every null, and which of the two buys more accuracy."""
        of_sets = _of_sets(self.cosines[FINETUNED])
        text = f"Mean cosine of the two changes {float(of_sets.estimate):+.3f}{_interval_text(of_sets, '+.3f')}. "
        excesses = {
            name: _of_sets(self.cosines[FINETUNED] - values)
            for name, values in self.cosines.items()
            if name != FINETUNED
        }
        shown = [name for name, excess in excesses.items() if float(excess.low) > 0]
        if len(self.sets) < 2:
            text += "A single demonstration set says nothing of how it compares with its nulls. "
        elif len(shown) == len(excesses):
            text += f"It exceeds that of every null ({', '.join(shown)}). "
        else:
            missing = ", ".join(name for name in excesses if name not in shown)
            text += f"No excess is shown over {missing}: the similarity by itself is no evidence of gradient descent. "
        gain = [
            one.correct["static patch"].double() - one.correct[FINETUNED].double() for one in self.sets
        ]  # paired query by query
        found = over_sets(gain).within(-1.0, 1.0)
        return (
            f"{text}The static patch's accuracy less that of finetuning is {float(found.estimate):+.1%}"
            f"{_interval_text(found, '+.1%')}."
        )


def patches_against_finetuning(
    model: Any, curves: Sequence[StaticCurve], *, seeds: Sequence[int] = range(5), prepend_bos: bool | None = None
) -> PatchesAgainstFinetuning:
    """Finetune on every demonstration set, and compare each static patch with it; see `patch_against_finetuning`.

    The null ``"other demonstrations"`` of a set is the next set's update.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        curves: one for each demonstration set.
        seeds: of the draws of shuffled labels.
        prepend_bos: as for the curves.

    Returns:
        The comparisons, with intervals over the sets.

    Raises:
        OptionError: no curves, or matrices that finetuning has no counterpart of.
    """
    if not curves:
        raise OptionError("give a static curve for each demonstration set, one or more: static_curve(...).")
    wrapped = wrap(model)
    updates = own_updates(wrapped, curves, prepend_bos=prepend_bos)
    n = len(curves)
    return PatchesAgainstFinetuning(
        tuple(
            patch_against_finetuning(
                wrapped,
                curve,
                update,
                seeds=seeds,
                others=[updates[(number + 1) % n]] if n > 1 else [],
                prepend_bos=prepend_bos,
            )
            for number, (curve, update) in enumerate(zip(curves, updates, strict=True))
        )
    )


def over_sets(values: Sequence[Float[Tensor, " query"]]) -> Interval:
    """Interval of the mean of one number per query of every set; of a single set, over its queries.

    Args:
        values: of each set.
    """
    sets = torch.cat([torch.full((len(own),), number) for number, own in enumerate(values)])
    return mean_interval(torch.cat([own.double() for own in values]), sets=sets)


def _of_sets(values: Float[Tensor, " demo_set *item"]) -> Interval:
    """Interval of the mean over everything else of one value per demonstration set."""
    means = values.flatten(1).nanmean(1)  # demo_set (item)
    return mean_interval(means, sets=torch.arange(len(means)))


def _numbers(key: str, found: Interval) -> dict[str, float]:
    return {key: float(found.estimate), f"{key}_low": float(found.low), f"{key}_high": float(found.high)}


def _interval_text(found: Interval, form: str) -> str:
    where = scope(found.n_sets)
    if float(found.low) != float(found.low):
        return f" (no interval, {where})"
    return f" (95 % interval {float(found.low):{form}} to {float(found.high):{form}}, {where})"
