"""Logit contributions of several queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition._logit_contributions import LogitContributions, part_of_contributions
from metaopt_lens.runs import rank_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class LogitContributionSet(Stored, Sequence[LogitContributions]):
    """Contributions to the answer's first token, query by query (see `LogitContributions`).

    `metaopt_lens.analysis.contribution_intervals` gives means with intervals over the demonstration sets.

    Attributes:
        items: of every query.
        sets: the demonstration set that each query was asked behind.
    """

    kind: ClassVar[str] = "logit contributions of several queries"

    items: tuple[LogitContributions, ...]
    sets: Int[Tensor, " query"]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> LogitContributions: ...

    @overload
    def __getitem__(self, index: slice) -> LogitContributionSet: ...

    def __getitem__(self, index: int | slice) -> LogitContributions | LogitContributionSet:
        if isinstance(index, slice):
            return LogitContributionSet(self.items[index], self.sets[index])
        return self.items[index]

    def __iter__(self) -> Iterator[LogitContributions]:
        return iter(self.items)

    @property
    def logit(self) -> Float[Tensor, " query"]:
        """The model's own logits, or differences of logits."""
        return torch.stack([item.logit for item in self.items])

    @property
    def zero_shot(self) -> Float[Tensor, "query layer head"]:
        """What heads write by reading the query (and what stands before the demonstrations)."""
        return torch.stack([item.zero_shot for item in self.items])

    @property
    def meta_gradient(self) -> Float[Tensor, "query layer head"]:
        """What heads write by reading the demonstrations."""
        return torch.stack([item.meta_gradient for item in self.items])

    @property
    def embedding(self) -> Float[Tensor, " query"]:
        """Of the residual stream before the first block."""
        return torch.stack([item.embedding for item in self.items])

    @property
    def mlp(self) -> Float[Tensor, "query layer"]:
        """Of every MLP."""
        return torch.stack([item.mlp for item in self.items])

    @property
    def biases(self) -> Float[Tensor, " query"]:
        """Of all biases."""
        return torch.stack([item.attention_bias.sum() + item.bias for item in self.items])

    def heads(self, top: int | None = None, *, part: str = "total") -> list[HeadRef]:
        """Heads by the size of their mean contribution, largest first.

        Args:
            top: how many; all by default.
            part: ``"total"``, ``"zero_shot"`` or ``"meta_gradient"``.
        """
        values = torch.stack([part_of_contributions(item, part) for item in self.items])
        return rank_heads(values.mean(0).abs(), top)

    def to_frame(self) -> pd.DataFrame:
        """All tables below each other, with columns `query` and `set`."""
        import pandas as pd

        return pd.concat(
            [
                item.to_frame().assign(query=index, set=int(group))
                for index, (item, group) in enumerate(zip(self.items, self.sets, strict=True))
            ],
            ignore_index=True,
        )

    def __repr__(self) -> str:
        n_sets = len(set(self.sets.tolist()))
        lines = [
            f"Logit contributions of {len(self)} queries behind {n_sets} demonstration set{'s' if n_sets > 1 else ''}, "
            f"means over queries: logit {float(self.logit.mean()):+.3f}",
            f"  embedding {float(self.embedding.mean()):+.3f}, heads reading the query "
            f"{float(self.zero_shot.sum((1, 2)).mean()):+.3f}, heads reading the demonstrations "
            f"{float(self.meta_gradient.sum((1, 2)).mean()):+.3f}, MLPs {float(self.mlp.sum(1).mean()):+.3f}, "
            f"biases {float(self.biases.mean()):+.3f}",
        ]
        for part in ("zero_shot", "meta_gradient"):
            means = getattr(self, part).mean(0)
            shown = ", ".join(f"{ref} {float(means[ref.layer, ref.head]):+.3f}" for ref in self.heads(5, part=part))
            lines.append(f"  {part}: {shown}")
        return "\n".join(lines)
