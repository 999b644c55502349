"""The result of `head_effects`: effects of heads on a metric, ranked, mapped, and the heads that make the ICL model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens._plots import draw
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.interventions._recovery import Recovery, recovery
from metaopt_lens.models import ModelInfo
from metaopt_lens.prompts import Demo
from metaopt_lens.runs import rank_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ICLHeads:
    """The heads that are the ICL model: added in rank order until their meta-gradients give a share of the gain.

    Attributes:
        heads: in the order of their effects on the queries they were ranked on.
        recovered: the share of the gain they give on the held-out queries (mean).
        recovery: how their number was found, with its interval.
    """

    heads: tuple[HeadRef, ...]
    recovered: float
    recovery: Recovery


@dataclass(frozen=True, eq=False, repr=False)
class HeadEffects(Stored):
    """Effect of every head's meta-gradient on a metric: with it minus without it.

    Attributes:
        metric: what was measured.
        n_demos: how many demonstrations there are.
        in_context, zero_shot: the metric of the in-context run and of the position-matched zero-shot run (all heads
            knocked out).
        exact, first_order: effect of each head, by knock-out and by its first-order estimate; NaN for heads that were
            not asked for, and where only estimates were.
        demo_exact: effect of hiding each demonstration from all heads; NaN where only estimates were asked for.
        demo_first_order: estimate for each demonstration in each head, all heads.
        demo_exact_per_head: the same by knock-out, where asked for.
        held_out: the queries on which heads were not ranked for the recovery; none if there is only one query, or if
            not all heads were knocked out.
        selection_order: heads by exact mean effect on the other queries, in the direction of the gain, as ``layer *
            n_heads + head``.
        added: the metric of the held-out queries with only the first n heads of that order in place, n from 0 to all.
        demos: the demonstrations' texts.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "head effects"

    model: ModelInfo
    metric: str
    n_demos: int
    in_context: Float[Tensor, " query"]
    zero_shot: Float[Tensor, " query"]
    exact: Float[Tensor, "query layer head"]
    first_order: Float[Tensor, "query layer head"]
    demo_exact: Float[Tensor, "query demo"]
    demo_first_order: Float[Tensor, "query layer head demo"]
    demo_exact_per_head: Float[Tensor, "query layer head demo"] | None
    held_out: Int[Tensor, " held_out"]
    selection_order: Int[Tensor, " rank"]
    added: Float[Tensor, "held_out n_added"]
    demos: tuple[Demo, ...] = ()
    provenance: dict[str, Any] = field(default_factory=provenance)

    @classmethod
    def _refusal(cls, body: Mapping[str, Any]) -> str | None:
        """Files of 0.1 do not say which queries were held out (nor the demonstrations' texts)."""
        if "demos" in body:
            return None
        return (
            "was written by metaopt-lens 0.1, which ranked heads and counted their recovery on the same queries: "
            "measure them again with head_effects(model, prompts)."
        )

    @property
    def gain(self) -> Float[Tensor, " query"]:
        """What the demonstrations do to the metric at the query's positions, all heads together."""
        return self.in_context - self.zero_shot

    @property
    def map(self) -> Float[Tensor, "layer head"]:
        """Exact effects, mean over queries, or the estimates where nothing was knocked out; NaN: not asked for."""
        return (self.exact if self.is_exact else self.first_order).mean(0)

    @property
    def is_exact(self) -> bool:
        """Whether heads were knocked out, and not only estimated."""
        return not bool(self.exact.isnan().all())

    @property
    def correlation(self) -> float:
        """Pearson correlation of first-order and exact effects over all queries and heads asked for.

        Raises:
            UndefinedMetricError: nothing was knocked out, or all effects are equal.
        """
        known = ~self.exact.isnan()
        return _pearson(self.first_order[known], self.exact[known])

    @property
    def demo_correlation(self) -> float:
        """The same over queries and demonstrations, all heads together (estimates summed over heads)."""
        known = ~self.demo_exact.isnan()
        return _pearson(self.demo_first_order.sum((1, 2))[known], self.demo_exact[known])

    def ranked(self, top: int | None = None) -> tuple[HeadRef, ...]:
        """Heads by their mean effect over all queries (`map`), those that give most of the gain first.

        Args:
            top: how many; None for all.
        """
        return tuple(rank_by_effect(self.map, self.gain)[:top])

    def recovery(self, share: float = 0.9) -> Recovery:
        """How many heads, ranked on the other queries, give `share` of the mean gain of the held-out queries.

        Args:
            share: of the mean gain, above 0 and at most 1.

        Raises:
            OptionError: a share outside (0, 1].
            UndefinedMetricError: a single query, heads that were not knocked out, or demonstrations that change
                nothing: there is no gain to recover.
        """
        if not len(self.selection_order):
            raise UndefinedMetricError(
                "how many heads recover the gain is not defined, as not all heads were knocked out: call head_effects "
                "without heads, layers and exact=False."
            )
        return recovery(self.added, share, "held-out queries")

    def icl_heads(self, share: float = 0.9) -> ICLHeads:
        """The heads whose meta-gradients give `share` of the mean gain, from the last upward crossing on.

        Args:
            share: of the mean gain, above 0 and at most 1.

        Raises:
            OptionError: a share outside (0, 1].
            UndefinedMetricError: as `recovery` does.
        """
        found = self.recovery(share)
        chosen = self.selection_order[: found.n_heads].tolist()
        heads = tuple(HeadRef(index // self.model.n_heads, index % self.model.n_heads) for index in chosen)
        return ICLHeads(heads=heads, recovered=float(found.curve[found.n_heads]), recovery=found)

    def to_frame(self) -> pd.DataFrame:
        """One row per head, ranked: mean and sample standard deviation over queries (undefined, NaN, for one query)."""
        import pandas as pd

        rows = []
        for rank, ref in enumerate(self.ranked()):
            exact, estimate = self.exact[:, ref.layer, ref.head], self.first_order[:, ref.layer, ref.head]
            rows.append(
                {
                    "rank": rank + 1,
                    "name": str(ref),
                    "layer": ref.layer,
                    "head": ref.head,
                    "exact": float(exact.mean()),
                    "exact_std": _std(exact),
                    "first_order": float(estimate.mean()),
                    "first_order_std": _std(estimate),
                }
            )
        return pd.DataFrame(rows)

    def recovery_to_frame(self) -> pd.DataFrame:
        """One row per number of heads, from 0: the head added last, and the share of the held-out gain they give.

        Raises:
            UndefinedMetricError: as `recovery` does.
        """
        import pandas as pd

        curve = self.recovery().curve.tolist()
        n = self.model.n_heads
        added = [str(HeadRef(index // n, index % n)) for index in self.selection_order.tolist()]
        return pd.DataFrame({"heads": range(len(curve)), "added": ["", *added], "recovered": curve})

    def demos_to_frame(self) -> pd.DataFrame:
        """One row per demonstration: its text, effect of hiding it from all heads, and its estimate."""
        import pandas as pd

        estimates = self.demo_first_order.sum((1, 2)).mean(0)
        texts = {"input": [d.input for d in self.demos], "label": [d.label for d in self.demos]} if self.demos else {}
        return pd.DataFrame(
            {
                "demo": range(self.n_demos),
                **texts,
                "exact": self.demo_exact.mean(0).numpy(),
                "first_order": estimates.numpy(),
            }
        )

    def plot(self) -> Any:
        """A plotly figure: layer x head maps of exact effects and estimates, and the recovered gain."""
        return draw(self, "plot")

    def __repr__(self) -> str:
        lines = [
            f"HeadEffects on the {self.metric} of {self.model.name}: {len(self.in_context)} queries, "
            f"{self.n_demos} demonstrations",
            f"  in context {float(self.in_context.mean()):.4g}, zero-shot {float(self.zero_shot.mean()):.4g}",
            "  largest effects: " + ", ".join(map(str, self.ranked(6))),
        ]
        try:
            found = self.recovery()
        except UndefinedMetricError as error:
            lines.append(f"  {error}")
        else:
            interval = "" if found.low is None else f" ({found.low} to {found.high})"
            total = self.exact.shape[1] * self.exact.shape[2]
            lines.append(
                f"  {found.n_heads}{interval} of {total} heads recover 90 % of the gain on {found.n_units} held-out "
                f"queries; {found.note}"
            )
        return "\n".join(lines)


def rank_by_effect(effects: Float[Tensor, "layer head"], gain: Float[Tensor, " query"]) -> list[HeadRef]:
    """All heads by their effect, those that give most of the mean gain first, whatever its sign.

    Args:
        effects: mean effect of every head.
        gain: gain of every query.
    """
    return rank_heads(effects * (1.0 if float(gain.mean()) >= 0 else -1.0))


def _std(values: Float[Tensor, " query"]) -> float:
    return float(values.std(correction=1)) if len(values) > 1 else float("nan")


def _pearson(a: Tensor, b: Tensor) -> float:
    if not len(a):
        raise UndefinedMetricError("nothing was knocked out: there is nothing to correlate the estimates with.")
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    if not scale > 0:
        raise UndefinedMetricError("the correlation of effects that are all equal is not defined.")
    return float((a * b).sum()) / scale
