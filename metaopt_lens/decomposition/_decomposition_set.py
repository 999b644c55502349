"""Decompositions of several prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens._storage import write_text
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition._answer_tokens import Answer, answer_targets
from metaopt_lens.decomposition._contribution_set import LogitContributionSet
from metaopt_lens.decomposition._decomposition import Decomposition, mean_strength
from metaopt_lens.decomposition._direct_logits import at_one_destination, logit_contributions
from metaopt_lens.decomposition._logit_contributions import LogitContributions
from metaopt_lens.runs import prompt_groups, rank_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class DecompositionSet(Sequence[Decomposition]):
    """Decompositions of several prompts, in order; those with the same demonstrations share their keys and values."""

    items: tuple[Decomposition, ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Decomposition: ...

    @overload
    def __getitem__(self, index: slice) -> DecompositionSet: ...

    def __getitem__(self, index: int | slice) -> Decomposition | DecompositionSet:
        return DecompositionSet(self.items[index]) if isinstance(index, slice) else self.items[index]

    def __iter__(self) -> Iterator[Decomposition]:
        return iter(self.items)

    def heads(self, top: int | None = None, *, by: Float[Tensor, "layer head"] | None = None) -> list[HeadRef]:
        """Heads in order of importance (see `Decomposition.heads`), strengths averaged over prompts and positions.

        Args:
            top: how many; all by default.
            by: a measured effect of every head, such as `HeadEffects.map`, instead of the strengths.
        """
        return rank_heads(mean_strength(self.items) if by is None else by, top)

    def logits(
        self, answers: Sequence[Answer] | None = None, *, versus: Sequence[Answer] | None = None
    ) -> LogitContributionSet:
        """What the parts add to the logit of every prompt's answer, at its first token (see `Decomposition.logits`).

        Args:
            answers: one per prompt; None for the prompts' labels.
            versus: the same rivals for all prompts; None for each prompt's other candidates, ``()`` for nothing.

        Raises:
            OptionError: another number of answers than prompts.
            PromptError: an answer of no token, or with the same first token as a rival.
        """
        wanted = [None] * len(self) if answers is None else list(answers)
        if len(wanted) != len(self):
            raise OptionError(f"{len(self)} prompts need {len(self)} answers, got {len(wanted)}.")
        items = tuple(_first_logits(item, answer, versus) for item, answer in zip(self.items, wanted, strict=True))
        sets = torch.zeros(len(self), dtype=torch.int64)
        for number, group in enumerate(prompt_groups([item.tokenized for item in self.items])):
            sets[group] = number
        return LogitContributionSet(items, sets)

    def to_frame(self) -> pd.DataFrame:
        """All tables below each other, with a `query` column that counts the prompts."""
        import pandas as pd

        return pd.concat(
            [item.to_frame().assign(query=index) for index, item in enumerate(self.items)], ignore_index=True
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write one pair of files per decomposition and an ``index.json``; returns the latter.

        Args:
            folder: where the files are written.
        """
        base = Path(folder)
        names = [f"{index:05d}" for index in range(len(self.items))]
        for name, item in zip(names, self.items, strict=True):
            item.save(base / name)
        return write_text(base / "index.json", json.dumps({"kind": f"{Decomposition.kind} set", "items": names}) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, model: Any | None = None) -> DecompositionSet:
        """Read what `save` wrote.

        Args:
            folder: what `save` wrote to.
            model: see `Decomposition.with_model`.

        Raises:
            FileFormatError: a file is missing, damaged, or holds something else.
        """
        index = Path(folder) / "index.json"
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["items"]
        except (OSError, ValueError, KeyError, TypeError):
            raise FileFormatError(f"{index} is not the index of a saved set of decompositions.") from None
        return cls(tuple(Decomposition.load(Path(folder) / name, model=model) for name in names))

    def __repr__(self) -> str:
        return f"DecompositionSet of {len(self.items)} prompts, the first:\n{self.items[0]!r}"


def _first_logits(item: Decomposition, answer: Answer | None, versus: Sequence[Answer] | None) -> LogitContributions:
    model = item.required_source("logits")
    targets = answer_targets(model, item.prompt, answer, versus, first_only=True)
    return logit_contributions(model, at_one_destination(item.runs.icl, len(item.positions) - 1), targets)
