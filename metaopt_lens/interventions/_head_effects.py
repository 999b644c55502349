"""The result of `head_effects`: effects of heads on a metric, ranked, mapped, and the heads that make the ICL model."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import FileFormatError, OptionError, UndefinedMetricError
from metaopt_lens._storage import load_result, save_result
from metaopt_lens._types import HeadRef
from metaopt_lens.models import ModelInfo

if TYPE_CHECKING:
    import pandas as pd

KIND = "head effects"
_TENSORS = (
    "in_context",
    "zero_shot",
    "exact",
    "first_order",
    "demo_exact",
    "demo_first_order",
    "demo_exact_per_head",
    "order",
    "added",
)


@dataclass(frozen=True)
class ICLHeads:
    """The heads that are the ICL model: added in rank order until their meta-gradients give a share of the gain.

    Attributes:
        heads: in rank order. share: what was asked for. recovered: the share they give (mean over queries).
    """

    heads: tuple[HeadRef, ...]
    share: float
    recovered: float


@dataclass(frozen=True, eq=False, repr=False)
class HeadEffects:
    """Effect of every head's meta-gradient on a metric: with it minus without it.

    Attributes:
        metric: what was measured; n_demos: how many demonstrations there are.
        in_context, zero_shot: the metric of the in-context run and of the position-matched zero-shot run (all heads
            knocked out).
        exact, first_order: effect of each head, by knock-out and by its first-order estimate.
        demo_exact: effect of hiding each demonstration from all heads.
        demo_first_order: estimate for each demonstration in each head.
        demo_exact_per_head: the same by knock-out, where asked for.
        order: heads by exact mean effect, in the direction of the gain, as ``layer * n_heads + head``.
        added: the metric with only the first n heads' meta-gradients in place, n from 0 to all.
    """

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
    order: Int[Tensor, " rank"]
    added: Float[Tensor, "query n_added"]

    @property
    def gain(self) -> Float[Tensor, " query"]:
        """What the demonstrations do to the metric at the query's positions, all heads together."""
        return self.in_context - self.zero_shot

    @property
    def map(self) -> Float[Tensor, "layer head"]:
        """Exact effects, mean over queries."""
        return self.exact.mean(0)

    @property
    def correlation(self) -> float:
        """Pearson correlation of first-order and exact effects over all queries and heads."""
        return _pearson(self.first_order.flatten(), self.exact.flatten())

    @property
    def demo_correlation(self) -> float:
        """The same over queries and demonstrations, all heads together (estimates summed over heads)."""
        return _pearson(self.demo_first_order.sum((1, 2)).flatten(), self.demo_exact.flatten())

    def ranked(self, top: int | None = None) -> tuple[HeadRef, ...]:
        """Heads by exact mean effect, those that give most of the gain first."""
        n = self.model.n_heads
        return tuple(HeadRef(index // n, index % n) for index in self.order[:top].tolist())

    def icl_heads(self, share: float = 0.9) -> ICLHeads:
        """The fewest heads, added in rank order, whose meta-gradients give `share` of the mean gain.

        Raises:
            UndefinedMetricError: the demonstrations change nothing, so there is no gain to recover.
        """
        if not 0 < share <= 1:
            raise OptionError(f"share must lie above 0 and at most at 1, got {share}.")
        gain = float(self.gain.mean())
        if gain == 0:
            raise UndefinedMetricError(
                f"the demonstrations do not change the {self.metric}: there is no gain to recover."
            )
        recovered = (self.added.mean(0) - self.added[:, 0].mean()) / gain
        enough = (recovered >= share - 1e-9).nonzero()
        n = int(enough[0]) if len(enough) else len(self.order)
        return ICLHeads(heads=self.ranked(n), share=share, recovered=float(recovered[n]))

    def to_frame(self) -> pd.DataFrame:
        """One row per head, ranked: mean and standard deviation over queries, and what the heads so far recover."""
        import pandas as pd

        gain = float(self.gain.mean())
        rows = []
        for rank, ref in enumerate(self.ranked()):
            exact, estimate = self.exact[:, ref.layer, ref.head], self.first_order[:, ref.layer, ref.head]
            so_far = float((self.added[:, rank + 1] - self.added[:, 0]).mean())
            rows.append(
                {
                    "rank": rank + 1,
                    "name": str(ref),
                    "layer": ref.layer,
                    "head": ref.head,
                    "exact": float(exact.mean()),
                    "exact_std": float(exact.std(correction=0)),
                    "first_order": float(estimate.mean()),
                    "first_order_std": float(estimate.std(correction=0)),
                    "recovered": so_far / gain if gain else float("nan"),
                }
            )
        return pd.DataFrame(rows)

    def demos_to_frame(self) -> pd.DataFrame:
        """One row per demonstration: effect of hiding it from all heads, and its estimate."""
        import pandas as pd

        estimates = self.demo_first_order.sum((1, 2)).mean(0)
        return pd.DataFrame(
            {
                "demo": range(self.n_demos),
                "exact": self.demo_exact.mean(0).numpy(),
                "first_order": estimates.numpy(),
            }
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path.safetensors`` and ``path.json``; returns the latter."""
        tensors = {name: t for name in _TENSORS if (t := getattr(self, name)) is not None}
        meta = {"model": dataclasses.asdict(self.model), "metric": self.metric, "n_demos": self.n_demos}
        return save_result(path, kind=KIND, tensors=tensors, meta=meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadEffects:
        """Read what `save` wrote.

        Raises:
            FileFormatError: a file is missing, damaged, or holds something else.
        """
        tensors, meta = load_result(path, kind=KIND)
        try:
            info = ModelInfo(**(meta["model"] | {"processing": tuple(meta["model"]["processing"])}))
            per_head = tensors.pop("demo_exact_per_head", None)
            return cls(
                model=info,
                metric=meta["metric"],
                n_demos=meta["n_demos"],
                demo_exact_per_head=per_head,
                **tensors,
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} is not a complete {KIND}: {error!r}.") from None

    def __repr__(self) -> str:
        gain = float(self.gain.mean())
        lines = [
            f"HeadEffects on the {self.metric} of {self.model.name}: {len(self.in_context)} queries, "
            f"{self.n_demos} demonstrations",
            f"  in context {float(self.in_context.mean()):.4g}, zero-shot {float(self.zero_shot.mean()):.4g}",
        ]
        if gain:
            found = self.icl_heads()
            total = self.exact.shape[1] * self.exact.shape[2]
            names = ", ".join(map(str, found.heads[:6])) + (", ..." if len(found.heads) > 6 else "")
            lines.append(f"  {len(found.heads)} of {total} heads recover 90 % of the gain: {names}")
        return "\n".join(lines)


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    if not scale > 0:
        raise UndefinedMetricError("the correlation of effects that are all equal is not defined.")
    return float((a * b).sum()) / scale
