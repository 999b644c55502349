"""Do demonstrations add up? Each alone and in company (docs/theory.md, section 12; after arXiv:2605.16591).

Two runs on the same tokens at the same positions, one in which demonstrations have read each other and one in which
they have not: keys, queries (the routing) and values are exchanged between them. And runs with a single demonstration
each, whose updates are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens._plots import draw
from metaopt_lens._storage import provenance
from metaopt_lens.analysis._ceiling import CONSTANT, last_z
from metaopt_lens.analysis._demo_sets import DemoSet, group_sets
from metaopt_lens.analysis._held_out import (
    N_FOLDS,
    Explained,
    check_folds,
    explained,
    held_out_mean,
    held_out_scale,
    join_explained,
    ratio_values,
    reordered,
)
from metaopt_lens.analysis._interval import Interval, mean_interval, scope, span_text
from metaopt_lens.analysis._similarity import rounding_tolerance, rounding_unit
from metaopt_lens.dual import weighted_values
from metaopt_lens.models import LensModel, ModelInfo, wrap
from metaopt_lens.prompts import Demo, PromptLike, as_prompts
from metaopt_lens.runs import Run, record, record_apart, refuse_acting, softmax_parts, tokenize_for

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("routing", "value", "interaction")
SUM = "sum of each alone"
SCALED_SUM = "sum of each alone, scaled"
COMPANY = "sum of their shares in company, scaled"
APART = "all together, none having read another"
OTHER_TASK = "another task's, each alone, scaled"


@dataclass(frozen=True, eq=False)
class Exchange:
    """What company changes in every demonstration's contribution ``sum_i a_i v_i`` to a head, at the last token.

    With a, v in company and a', v' apart: ``a v - a' v' = (a - a') v' + a' (v - v') + (a - a') (v - v')``.

    Attributes:
        company: ``sum_i a_i v_i`` over the demonstration's tokens.
        apart: ``sum_i a'_i v'_i``.
        routing: from keys and queries, ``sum_i (a_i - a'_i) v'_i``.
        value: from values, ``sum_i a'_i (v_i - v'_i)``.
        interaction: from both together, ``sum_i (a_i - a'_i) (v_i - v'_i)``.
    """

    company: Float[Tensor, "layer head demo d_head"]
    apart: Float[Tensor, "layer head demo d_head"]
    routing: Float[Tensor, "layer head demo d_head"]
    value: Float[Tensor, "layer head demo d_head"]
    interaction: Float[Tensor, "layer head demo d_head"]

    @property
    def total(self) -> Float[Tensor, "layer head demo d_head"]:
        """``company - apart``, the sum of the three."""
        return self.company - self.apart


def exchange(company: Run, apart: Run) -> Exchange:
    """Exchange attention and values between two runs of one prompt, in float64.

    Args:
        company: the in-context run.
        apart: of `record_apart`.
    """
    demos = company.tokens.demos
    found: dict[str, list[Tensor]] = {name: [] for name in ("company", "apart", *PARTS)}
    for layer in range(len(company.own_v)):
        a, a_apart = (run.pattern[-1, layer].double() for run in (company, apart))  # head src
        v, v_apart = (run.v_of(layer).double() for run in (company, apart))
        for name, weights, values in (
            ("company", a, v),
            ("apart", a_apart, v_apart),
            ("routing", a - a_apart, v_apart),
            ("value", a_apart, v - v_apart),
            ("interaction", a - a_apart, v - v_apart),
        ):
            rows = [weighted_values(weights[:, None, span.slice], values[span.slice])[0] for span in demos]
            found[name].append(torch.stack(rows, dim=1))
    return Exchange(**{name: torch.stack(rows).detach().cpu() for name, rows in found.items()})


@dataclass(frozen=True, eq=False, repr=False)
class DemonstrationAlgebra(Stored):
    """Demonstrations alone, in company, and in sum.

    Attributes:
        model: names and sizes.
        size: how much company changes of a head's meta-gradient, ``|t| / |sum_D a v|`` with ``t = sum_D a v - sum_D a'
            v'``.
        squares: ``|t|^2``; NaN where it is no more than rounding, as in layer 0, where demonstrations have not read
            anything yet.
        components: ``routing . t``, ``value . t`` and ``interaction . t``, which sum to ``|t|^2``.
        additivity: held-out R^2 of the update z^ICL - z^ZS of n demonstrations, by what is to explain it.
        sets: the demonstration set of each query.
        n_folds: of the cross-validation of scales, over the queries behind the same demonstrations.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "demonstration algebra"

    model: ModelInfo
    size: Float[Tensor, "query layer head"]
    squares: Float[Tensor, "query layer head"]
    components: Mapping[str, Float[Tensor, "query layer head"]]
    additivity: Explained
    sets: Int[Tensor, " query"]
    n_folds: int
    provenance: dict[str, Any] = field(default_factory=provenance)

    def share(self, part: str, *, layer: int | None = None) -> Interval:
        """Mean share over heads of a part in what company changes, with its t interval over demonstration sets.

        A head's share is ``sum_k part_k . t_k / sum_k |t_k|^2`` over the queries of a set; the three sum to 1.

        Args:
            part: ``"routing"``, ``"value"`` or ``"interaction"``; ``"size"`` for the mean size of the whole change.
            layer: counted from 0; None for all.

        Raises:
            OptionError: no such part.
        """
        if part != "size" and part not in self.components:
            names = ", ".join(map(repr, (*self.components, "size")))
            raise OptionError(f"there is no part {part!r}: choose one of {names}.")
        values = self.size if part == "size" else ratio_values(self.components[part], self.squares, self.sets)
        return mean_interval((values if layer is None else values[:, [layer]]).nanmean((1, 2)), sets=self.sets)

    def r_squared(self, name: str = SCALED_SUM, *, layer: int | None = None) -> Interval:
        """Mean held-out R^2 over heads, with its t interval over demonstration sets.

        Args:
            name: what is to explain the update.
            layer: counted from 0; None for all.

        Raises:
            OptionError: nothing of that name.
        """
        return self.additivity.interval(name, self.sets, layer=layer)

    def to_frame(self) -> pd.DataFrame:
        """A row for the size of what company changes, for each share of it, and for the R^2 of every sum."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for part in ("size", *self.components):
            rows.append({"quantity": f"company: {part}", **_numbers(self.share(part)), "cosine": float("nan")})
        for name in self.additivity.errors:
            cosine = float(self.additivity.cosine(name, self.sets).estimate)
            rows.append({"quantity": f"R^2: {name}", **_numbers(self.r_squared(name)), "cosine": cosine})
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """A plotly figure: shares of what company changes, and R^2 of the sums."""
        return draw(self, "plot")

    def _repr_html_(self) -> str:
        table: str = self.to_frame().to_html(index=False, float_format="{:.3f}".format)
        return table

    def __repr__(self) -> str:
        n_sets = len(set(self.sets.tolist()))
        lines = [
            f"DemonstrationAlgebra of {self.model.name}: {len(self.sets)} queries, {scope(n_sets)} (R^2 of the update "
            f"of z, scales fitted in {self.n_folds} folds of queries)"
        ]
        for row in self.to_frame().to_dict("records"):
            span = span_text(row["low"], row["high"])
            cosine = "" if row["cosine"] != row["cosine"] else f", cosine {row['cosine']:+.3f}"
            lines.append(f"  {row['quantity']}: {row['estimate']:.3f}{span}{cosine}")
        return "\n".join(lines)


def _numbers(found: Interval) -> dict[str, float]:
    return {"estimate": float(found.estimate), "low": float(found.low), "high": float(found.high)}


def demonstration_algebra(
    model: Any,
    prompts: Sequence[PromptLike],
    *,
    other: Sequence[Demo | tuple[str, str]] | None = None,
    n_folds: int = N_FOLDS,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
) -> DemonstrationAlgebra:
    """Is the update of n demonstrations the sum of theirs, and what does company change?

    Company: see `Exchange`. Additivity: R^2 of u_n = z^ICL - z^ZS by ``sum_i u_i``, with u_i the update of
    demonstration i in a prompt of its own, as it is and with one scale per head fitted on other queries (a softmax
    divides its mass, so n updates of n runs are too large); by the exact sum of shares in company, z - z_without; by z
    of the run in which no demonstration has read another; and, as nulls, by another task's demonstrations and by one
    constant vector.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: queries, at least `n_folds` behind each set of two or more demonstrations.
        other: another task's demonstrations; without them that null is left out.
        n_folds: of the cross-validation of scales.
        prepend_bos: put BOS first; None for the model's default.
        batch_size: queries run together; by default as many as memory allows.

    Raises:
        PromptError: a set of one demonstration, or too few queries behind one; says how many are needed.
        OptionError: fewer than three folds, or momentum attention.
    """
    wrapped, parsed = wrap(model), as_prompts(prompts)
    refuse_acting(wrapped, "demonstration_algebra")
    groups = group_sets(wrapped, parsed, prepend_bos=prepend_bos)
    check_folds(n_folds, (len(g.indices) for g in groups), what="queries behind every demonstration set")
    for number, group in enumerate(groups):
        if len(group.prompts[0].demos) < 2:
            raise PromptError(f"demonstration set {number} has one demonstration: company needs at least two.")
    if other is not None and not other:
        raise PromptError("another task needs at least one demonstration: give other=[(input, label), ...], or None.")
    eps = rounding_unit(wrapped.info.dtype)
    sets = torch.zeros(len(parsed), dtype=torch.int64)
    changes: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    sums: list[Explained] = []
    for number, group in enumerate(groups):
        sets[group.indices] = number
        runs = record(wrapped, group.tokenized, settings=("icl", "zs"), batch_size=batch_size)
        icl = [r.icl for r in runs]
        apart = record_apart(wrapped, group.tokenized, batch_size=batch_size)
        changes += [sizes_of(exchange(*pair), eps=eps) for pair in zip(icl, apart, strict=True)]
        zero = last_z([r.zs for r in runs]).double()
        options: dict[str, Any] = {"prepend_bos": prepend_bos, "batch_size": batch_size}
        sums.append(
            additivity(
                last_z(icl).double() - zero,
                alone=_summed(wrapped, group, group.prompts[0].demos, zero, **options),
                company=torch.stack([softmax_parts(run).update[-1].detach().double().cpu() for run in icl]),
                apart=last_z(apart).double() - zero,
                other=None if other is None else _summed(wrapped, group, other, zero, **options),
                folds=torch.arange(len(icl)) % n_folds,
                smallest=rounding_tolerance(eps) * zero.norm(dim=-1),
            )
        )
    order = torch.tensor([index for group in groups for index in group.indices]).argsort()
    sizes, squares, components = zip(*changes, strict=True)
    return DemonstrationAlgebra(
        wrapped.info,
        torch.stack(sizes)[order],
        torch.stack(squares)[order],
        {part: torch.stack([own[part] for own in components])[order] for part in PARTS},
        reordered(join_explained(sums), order),
        sets,
        n_folds,
    )


def sizes_of(
    parts: Exchange, *, eps: float
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"], dict[str, Float[Tensor, "layer head"]]]:
    """Size, square and components of what company changes of a head's meta-gradient; see `DemonstrationAlgebra`.

    Args:
        parts: of one query.
        eps: rounding unit of the recorded numbers.
    """
    total, whole = parts.total.sum(2), parts.company.sum(2)
    size = total.norm(dim=-1) / whole.norm(dim=-1)  # NaN where nothing of D is seen
    known = size > rounding_tolerance(eps)
    components = {name: (getattr(parts, name).sum(2) * total).sum(-1) for name in PARTS}
    square = torch.where(known, total.square().sum(-1), torch.nan)
    return size, square, {name: torch.where(known, t, torch.nan) for name, t in components.items()}


def additivity(
    update: Float[Tensor, "query layer head d_head"],
    *,
    alone: Float[Tensor, "query layer head d_head"],
    company: Float[Tensor, "query layer head d_head"],
    apart: Float[Tensor, "query layer head d_head"],
    other: Float[Tensor, "query layer head d_head"] | None,
    folds: Int[Tensor, " query"],
    smallest: Float[Tensor, "query layer head"],
) -> Explained:
    """How well each sum explains the update of all demonstrations, behind one set.

    Args:
        update: z^ICL - z^ZS.
        alone: sum of the updates of runs with one demonstration each.
        company: z - z_without.
        apart: update of the run in which no demonstration has read another.
        other: as `alone`, of another task.
        folds: of the queries.
        smallest: norm up to which an update is rounding.
    """
    predictions = {
        CONSTANT: held_out_mean(update.permute(1, 2, 0, 3)[..., None, :], folds)[..., 0, :].permute(2, 0, 1, 3),
        SUM: alone,
        SCALED_SUM: _scaled(alone, update, folds),
        COMPANY: _scaled(company, update, folds),
        APART: apart,
    }
    if other is not None:
        predictions[OTHER_TASK] = _scaled(other, update, folds)
    return explained(update, predictions, update.norm(dim=-1) > smallest)


def _scaled(direction: Tensor, target: Tensor, folds: Tensor) -> Tensor:
    """The direction of every head with one scale for all queries, ``[query, layer, head, d_head]``."""
    made = held_out_scale(direction.permute(1, 2, 0, 3)[..., None, :], target.permute(1, 2, 0, 3), folds)
    return made.permute(2, 0, 1, 3)


def _summed(
    model: LensModel,
    group: DemoSet,
    demos: Sequence[Demo | tuple[str, str]],
    zero: Float[Tensor, "query layer head d_head"],
    *,
    prepend_bos: bool | None,
    batch_size: int | None,
) -> Float[Tensor, "query layer head d_head"]:
    """Sum of the updates of every demonstration in a prompt of its own."""
    total = torch.zeros_like(zero)
    for demo in demos:
        tokens = [tokenize_for(model, p.with_demos([demo]), prepend_bos=prepend_bos) for p in group.prompts]
        total += last_z([r.icl for r in record(model, tokens, settings=("icl",), batch_size=batch_size)]) - zero
    return total
