"""Which optimiser a head's in-context update looks like: rungs of a ladder (docs/theory.md, section 12).

``u = P dW_ICL q`` with P one number (gradient descent), one and a second for ``dW_ICL C q`` (GD++), a diagonal, any
matrix (preconditioned, arXiv:2306.00297); the same with the softmax gate alpha in front. What a rung needs is fitted on
some demonstration sets and judged on others, as an optimiser is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError
from metaopt_lens._plots import draw
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.analysis._demo_sets import group_sets
from metaopt_lens.analysis._held_out import (
    MIN_FOLDS,
    N_FOLDS,
    Explained,
    check_folds,
    explained,
    held_out_mean,
    held_out_predictions,
    held_out_scale,
)
from metaopt_lens.analysis._interval import Interval, scope, span_text
from metaopt_lens.analysis._similarity import rounding_tolerance, rounding_unit
from metaopt_lens.dual import at_least_float32, linear_weights, weighted_values
from metaopt_lens.models import ModelInfo, wrap
from metaopt_lens.prompts import PromptLike, TokenizedPrompt, as_prompts
from metaopt_lens.runs import Run, linear_parts, record, refuse_acting, softmax_parts

if TYPE_CHECKING:
    import pandas as pd

GRADIENT_DESCENT, GD_PLUS_PLUS, DIAGONAL, PRECONDITIONED = "gradient descent", "GD++", "diagonal", "preconditioned"
RUNGS = (GRADIENT_DESCENT, GD_PLUS_PLUS, DIAGONAL, PRECONDITIONED)
CONSTANT = "one constant vector"
ANY_MAP = "any linear map of q"
LADDER_TARGETS = ("total", "direct")


def gated(rung: str) -> str:
    """Name of a rung with the softmax gate in front.

    Args:
        rung: one of `RUNGS`.
    """
    return f"{rung}, gated"


@dataclass(frozen=True, eq=False, repr=False)
class OptimiserLadder(Stored):
    """Held-out R^2 of the in-context update of every head, rung by rung.

    Attributes:
        model: names and sizes.
        target: ``"total"``, z^ICL - z^ZS, or ``"direct"``, z^ICL - z_without.
        explained: by rung; next to them one constant vector, and any linear map of q, which knows no demonstrations.
        sets: the demonstration set of each query.
        left_out: what is left out in turn: demonstration ``"sets"``, or ``"queries"`` where there are fewer than three
            sets. A matrix P fitted behind a single set can be anything: then only the one-number rungs mean much.
        n_folds: of the cross-validation.
        centred: whether only differences between queries of one set are explained, their mean left out of everything.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "optimiser ladder"

    model: ModelInfo
    target: str
    explained: Explained
    sets: Int[Tensor, " query"]
    left_out: Literal["sets", "queries"]
    n_folds: int
    centred: bool
    provenance: dict[str, Any] = field(default_factory=provenance)

    @property
    def rungs(self) -> tuple[str, ...]:
        """Names, in the order of the ladder."""
        return tuple(self.explained.errors)

    def r_squared(self, rung: str, *, layer: int | None = None) -> Interval:
        """Mean held-out R^2 over heads, with its t interval over demonstration sets.

        Args:
            rung: one of `rungs`.
            layer: counted from 0; None for all.

        Raises:
            OptionError: no such rung.
        """
        return self.explained.interval(rung, self.sets, layer=layer)

    def per_head(self, rung: str) -> Float[Tensor, "layer head"]:
        """Held-out R^2 of every head, mean over demonstration sets.

        Args:
            rung: one of `rungs`.

        Raises:
            OptionError: no such rung.
        """
        values = self.explained.r_squared(rung, self.sets)
        sets = [values[self.sets == number].nanmean(0) for number in sorted(set(self.sets.tolist()))]
        return torch.stack(sets).nanmean(0)

    def to_frame(self) -> pd.DataFrame:
        """One row per rung: R^2 and cosine with their intervals, and the head with the highest R^2."""
        import pandas as pd

        rows = []
        for rung in self.rungs:
            r, c, heads = self.r_squared(rung), self.explained.cosine(rung, self.sets), self.per_head(rung)
            best = int(heads.nan_to_num(-torch.inf).argmax())
            row: dict[str, Any] = {"rung": rung, "r_squared": float(r.estimate), "low": float(r.low)}
            row |= {"high": float(r.high), "cosine": float(c.estimate), "cosine_low": float(c.low)}
            row |= {"cosine_high": float(c.high), "best_head": str(HeadRef(*divmod(best, self.model.n_heads)))}
            rows.append(row | {"best_r_squared": float(heads.flatten()[best])})
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """A plotly figure: held-out R^2 of every rung, with and without the gate."""
        return draw(self, "plot")

    def _repr_html_(self) -> str:
        table: str = self.to_frame().to_html(index=False, float_format="{:.3f}".format)
        return table

    def __repr__(self) -> str:
        centred = ", less its mean over the queries of a set" if self.centred else ""
        lines = [
            f"OptimiserLadder of {self.model.name}: held-out R^2 of the {self.target} in-context update of z{centred}, "
            f"{len(self.sets)} queries, {self.left_out} left out in {self.n_folds} folds, "
            f"{scope(len(set(self.sets.tolist())))}"
        ]
        for row in self.to_frame().to_dict("records"):
            span = span_text(row["low"], row["high"])
            head = f"highest {row['best_head']} {row['best_r_squared']:.3f}"
            lines.append(f"  {row['rung']}: {row['r_squared']:.3f}{span}, cosine {row['cosine']:+.3f}, {head}")
        return "\n".join(lines)


def optimiser_ladder(
    model: Any,
    prompts: Sequence[PromptLike],
    *,
    target: str = "total",
    centred: bool = False,
    n_folds: int = N_FOLDS,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
) -> OptimiserLadder:
    """How much of every head's in-context update is a step of gradient descent, of GD++, of a preconditioned one.

    With dW_ICL = sum_D v (x) k and C = sum_D k (x) k:  gamma dW_ICL q (gradient descent);  gamma dW_ICL q + delta
    dW_ICL C q (GD++, arXiv:2212.07677);  diag(p) dW_ICL q;  P dW_ICL q (after arXiv:2306.00297). ``gated`` rungs are
    these times alpha, the attention mass on the demonstrations. One linear regression per head and rung, ridge chosen
    within what is fitted on. The part of a preconditioner that acts on the inputs is in q and k already, W_Q W_K^T.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: queries behind one or several sets of demonstrations; three sets or more are left out in turn.
        target: ``"total"``, z^ICL - z^ZS, or ``"direct"``, z^ICL - z_without.
        centred: leave the mean over the queries of a set out of everything: what one constant vector cannot explain.
        n_folds: of the cross-validation.
        prepend_bos: put BOS first; None for the model's default.
        batch_size: queries run together; by default as many as memory allows.

    Raises:
        PromptError: fewer than three sets, and too few queries behind one of them; says how many are needed.
        OptionError: an unknown target, or fewer than three folds.
    """
    wrapped, parsed = wrap(model), as_prompts(prompts)
    refuse_acting(wrapped, "optimiser_ladder")
    if target not in LADDER_TARGETS:
        raise OptionError(f"target must be {' or '.join(map(repr, LADDER_TARGETS))}, got {target!r}.")
    groups = group_sets(wrapped, parsed, prepend_bos=prepend_bos)
    by_set = len(groups) >= MIN_FOLDS
    n_folds = min(n_folds, len(groups)) if by_set and n_folds >= MIN_FOLDS else n_folds
    if not by_set or n_folds < MIN_FOLDS:
        check_folds(n_folds, (len(g.indices) for g in groups), what="queries behind every demonstration set")
    sets, folds = (torch.zeros(len(parsed), dtype=torch.int64) for _ in range(2))
    tokens: dict[int, TokenizedPrompt] = {}
    for number, group in enumerate(groups):
        sets[group.indices] = number
        folds[group.indices] = (
            torch.full((len(group.indices),), number) if by_set else _count(group.indices)
        ) % n_folds
        tokens.update(zip(group.indices, group.tokenized, strict=True))
    settings: tuple[Literal["icl", "zs"], ...] = ("icl", "zs") if target == "total" else ("icl",)
    runs = record(wrapped, [tokens[i] for i in range(len(parsed))], settings=settings, batch_size=batch_size)
    icl = [r.icl for r in runs]
    parts = [softmax_parts(run) for run in icl]
    z = _last([run.z for run in icl])
    base = _last([r.zs.z for r in runs] if target == "total" else [part.without_demos for part in parts])
    update = z - base if target == "total" else _last([part.update for part in parts])
    eps = rounding_unit(wrapped.info.dtype)
    defined = update.norm(dim=-1) > rounding_tolerance(eps) * base.norm(dim=-1)
    predictions = climb(
        update,
        linear=_last([linear_parts(run).meta_gradient for run in icl]),
        curved=torch.stack([curved_update(run) for run in icl]),
        gate=torch.stack([part.mass[-1].detach().double().cpu() for part in parts]),
        q=_last([run.q for run in icl]),
        folds=folds,
        centred_in=sets if centred else None,
    )
    update = _centred(update, sets) if centred else update
    found = explained(update, predictions, defined)
    return OptimiserLadder(wrapped.info, target, found, sets, "sets" if by_set else "queries", n_folds, centred)


def _centred(
    t: Float[Tensor, "query layer head d"], sets: Int[Tensor, " query"]
) -> Float[Tensor, "query layer head d"]:
    """Less the mean over the queries of its set."""
    found = torch.empty_like(t)
    for number in set(sets.tolist()):
        rows = sets == number
        found[rows] = t[rows] - t[rows].mean(0)
    return found


def _count(indices: Sequence[int]) -> Int[Tensor, " query"]:
    return torch.arange(len(indices))


def _last(rows: Sequence[Tensor]) -> Float[Tensor, "query layer head d_head"]:
    return torch.stack([row[-1].detach().double().cpu() for row in rows])


def curved_update(run: Run) -> Float[Tensor, "layer head d_head"]:
    """``dW_ICL C q`` with ``C = sum_D k (x) k`` over the visible tokens of D, at the last token: what GD++ adds.

    Args:
        run: an in-context run.
    """
    rows = []
    for layer, visible in enumerate(run.visible):
        seen = visible[-1:] & run.in_demos
        k, q = at_least_float32(run.k_of(layer)), run.q[-1:, layer]
        turned = weighted_values(linear_weights(q, k, seen), k)  # 1 head d_head: C q
        rows.append(weighted_values(linear_weights(turned, k, seen), run.v_of(layer))[0])
    return torch.stack(rows).detach().double().cpu()


def climb(
    update: Float[Tensor, "query layer head d_head"],
    *,
    linear: Float[Tensor, "query layer head d_head"],
    curved: Float[Tensor, "query layer head d_head"],
    gate: Float[Tensor, "query layer head"],
    q: Float[Tensor, "query layer head d_q"],
    folds: Int[Tensor, " query"],
    centred_in: Int[Tensor, " query"] | None = None,
) -> dict[str, Float[Tensor, "query layer head d_head"]]:
    """What every rung says of the update of every query, fitted on the other folds.

    Args:
        update: to be explained.
        linear: ``dW_ICL q``.
        curved: ``dW_ICL C q``.
        gate: attention mass on the demonstrations.
        q: query vectors.
        folds: of the queries (see `held_out_predictions`).
        centred_in: the demonstration set of each query, to leave its mean out of everything.
    """

    def read(t: Tensor) -> Float[Tensor, "layer head query d"]:
        t = t.double() if centred_in is None else _centred(t.double(), centred_in)
        return rearrange(t, "query layer head d -> layer head query d")

    target, heads_q = read(update), read(q)
    found = {CONSTANT: held_out_mean(target[..., None, :], folds)[..., 0, :], ANY_MAP: _mapped(heads_q, target, folds)}
    mass = gate.double()[..., None]
    for name, by in ((str, torch.ones_like(mass)), (gated, mass)):
        a, b = read(by * linear), read(by * curved)
        found[name(GRADIENT_DESCENT)] = held_out_scale(a[..., None, :], target, folds)
        found[name(GD_PLUS_PLUS)] = held_out_scale(torch.stack([a, b], dim=-2), target, folds)
        found[name(DIAGONAL)] = held_out_scale(a.mT[..., None, None], target.mT[..., None], folds)[..., 0].mT
        found[name(PRECONDITIONED)] = _mapped(a, target, folds)
    return {name: rearrange(t, "layer head query d -> query layer head d") for name, t in found.items()}


def _mapped(x: Tensor, t: Tensor, folds: Tensor) -> Tensor:
    return held_out_predictions(x[..., None, :], t[..., None, :], folds)[..., 0, :]
