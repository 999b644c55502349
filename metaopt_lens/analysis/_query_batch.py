"""Queries behind one demonstration set in all settings, and what several statistics read of their runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.analysis._low_rank import (
    MatrixReadings,
    MemoryBatch,
    compare_matrices,
    read_with_keys,
    rotated_overlaps,
)
from metaopt_lens.analysis._measuring import Context
from metaopt_lens.analysis._output_parts import PARTS, Part
from metaopt_lens.analysis._output_space import Labels, OutputSpace
from metaopt_lens.analysis._similarity import difference, rounding_unit
from metaopt_lens.analysis._training_attention import TrainingAttention, ranked_maps
from metaopt_lens.dual import SoftmaxParts, at_least_float32
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.runs import (
    CHANGED,
    Run,
    Runs,
    Setting,
    demo_scores,
    linear_parts,
    own_scores,
    scaled_queries,
    softmax_parts,
)

_Found = TypeVar("_Found")


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """What statistics read: everything at the last token of each query, on the CPU, in float32 at least.

    Attributes:
        space: of the runs' model.
        update: what the finetuned runs have.
        runs: of every query, in all five settings.
        memory: of every query, its keys and values with and without the update.
        context: of the comparison.
        labels: of every query, the first tokens of its label words; None where updates are not split by them.
        trained: query vectors of each demonstration's tokens in its own finetuning step (see `demonstration_queries`);
            None where they were not kept, or are those of other demonstrations.
        base: another batch, with which this one shares the runs of some settings; what is read of those is read once.
    """

    space: OutputSpace
    update: WeightUpdate
    runs: tuple[Runs, ...]
    memory: MemoryBatch
    context: Context
    labels: tuple[Labels, ...] | None = None
    trained: tuple[Float[Tensor, "_ layer d_q"], ...] | None = None
    base: QueryBatch | None = None

    @property
    def eps(self) -> float:
        """Rounding unit of what the model computed."""
        return rounding_unit(self.runs[0].icl.z.dtype)

    @property
    def lengths(self) -> Int[Tensor, " query"]:
        """Tokens of each query."""
        return torch.tensor([len(runs.icl.tokens.query) for runs in self.runs])

    def z(self, setting: Setting) -> Float[Tensor, "query layer head d_head"]:
        """Head outputs in a setting."""
        return self._once("z", setting, lambda: self._last(setting, lambda run: run.z))

    def change(self, first: Setting, second: Setting) -> Float[Tensor, "query layer head d_head"]:
        """Head outputs of one setting minus those of another; NaN where no more than rounding is left."""
        return difference(self.z(first), self.z(second), eps=self.eps)

    def part(self, vectors: Float[Tensor, "query layer head d_head"], part: Part) -> Tensor:
        """A part of head outputs after W_O (see `OutputSpace.part`); needs `labels`."""
        assert self.labels is not None
        return self.space.part(vectors, self.labels, part)

    def hidden_part(self, setting: Setting, part: Part) -> Tensor:
        """The same of `hidden`."""
        labels = self.labels
        assert labels is not None
        return self._once(part, setting, lambda: self.space.stream_part(self.hidden(setting), labels, part))

    def hidden(self, setting: Setting) -> Float[Tensor, "query layer 1 d_model"]:
        """Attention outputs after W_O and b_O, as those of a layer's only head."""
        update = self.update if setting in CHANGED else None

        def read() -> Tensor:
            z = torch.stack([runs[setting].z[-1].detach() for runs in self.runs])
            return _kept(self.space.attention(z, update))[:, :, None]

        return self._once("hidden", setting, read)

    def scores(self, setting: Setting) -> Float[Tensor, "query layer head pos"]:
        """Scores before the softmax over the query's own tokens, NaN behind a query's end."""

        def read() -> Tensor:
            rows = [_kept(own_scores(runs[setting])[-1]) for runs in self.runs]
            longest = max(row.shape[-1] for row in rows)
            return torch.stack([_filled(row, longest) for row in rows])

        return self._once("scores", setting, read)

    @property
    def parts(self) -> SoftmaxParts:
        """The exact split of the in-context runs, ``[query, layer, head, d_head]``."""

        def read() -> SoftmaxParts:
            found = [softmax_parts(runs.icl) for runs in self.runs]
            names = [field.name for field in dataclasses.fields(SoftmaxParts)]
            return SoftmaxParts(**{name: torch.stack([_kept(getattr(p, name)[-1]) for p in found]) for name in names})

        return self._once("parts", "icl", read)

    @property
    def linear(self) -> Float[Tensor, "query layer head d_head"]:
        """``dW_ICL q`` with q of the in-context run."""
        return self._once("linear", "icl", lambda: self._last("icl", lambda run: linear_parts(run).meta_gradient))

    @cached_property
    def matrices(self) -> MatrixReadings:
        """``dW_FT q``, and the matrices dW_ICL and dW_FT compared."""
        return compare_matrices([runs.icl for runs in self.runs], self.memory)

    @property
    def read_with_keys(self) -> tuple[Tensor, Tensor]:
        """``dW_ICL k`` and ``dW_FT k`` with k the last token's own key in the in-context run."""
        return read_with_keys([runs.icl for runs in self.runs], self.memory)

    @cached_property
    def rotated_overlaps(self) -> tuple[Float[Tensor, "query layer head"], Float[Tensor, "query layer head"]]:
        """Overlap of the leading singular subspaces, left and right, with finetuning's changes turned at random."""
        return rotated_overlaps([runs.icl for runs in self.runs], self.memory)

    @cached_property
    def training_attention(self) -> TrainingAttention:
        """Attention to the demonstrations' tokens, in context and in finetuning; needs `trained`."""
        assert self.trained is not None
        context = self._last("icl", lambda run: demo_scores(run).sum(-2))
        return ranked_maps(context, self._last("ft", scaled_queries), self.trained, convention=self.context.convention)

    @cached_property
    def _read(self) -> dict[tuple[str, Setting], Any]:
        return {}

    def _once(self, what: str, setting: Setting, read: Callable[[], _Found]) -> _Found:
        """Something of a setting that several statistics read; from the base batch where the runs are its own."""
        if self.base is not None and self.base.runs[0][setting] is self.runs[0][setting]:
            return self.base._once(what, setting, read)
        if (what, setting) not in self._read:
            self._read[what, setting] = read()
        found: _Found = self._read[what, setting]
        return found

    def _last(self, setting: Setting, read: Callable[[Run], Tensor]) -> Tensor:
        return torch.stack([_kept(read(runs[setting])[-1]) for runs in self.runs])


def _kept(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor.detach()).cpu()


def _filled(row: Tensor, longest: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, longest - row.shape[-1]), value=torch.nan)


NORMS: dict[str, Callable[[QueryBatch], Tensor]] = {
    "icl": lambda batch: (batch.z("icl") - batch.z("zs")).norm(dim=-1),
    "ft": lambda batch: (batch.z("ft") - batch.z("zs")).norm(dim=-1),
    "direct": lambda batch: batch.parts.update.norm(dim=-1),
    "meta_gradient": lambda batch: batch.parts.meta_gradient.norm(dim=-1),
    "mass": lambda batch: batch.parts.mass,
    "rank_icl": lambda batch: batch.matrices.rank_icl,
    "rank_ft": lambda batch: batch.matrices.rank_ft,
}


def norms_of(batch: QueryBatch) -> dict[str, Float[Tensor, "query layer head"]]:
    """Sizes that a comparison reports next to its similarities.

    Args:
        batch: some queries of one demonstration set.
    """
    found = {name: read(batch).float() for name, read in NORMS.items()}
    return found if batch.labels is None else found | _shares(batch)


def _shares(batch: QueryBatch) -> dict[str, Tensor]:
    """Of the squared norm of both updates after W_O, by part."""
    shares: dict[str, Tensor] = {}
    for name, setting in SHARED.items():
        squares = {part: batch.part(batch.change(setting, "zs"), part).square().sum(-1) for part in PARTS}
        whole = torch.stack(list(squares.values())).sum(0)
        shares |= {share_name(name, part): (square / whole).float() for part, square in squares.items()}
    return shares


SHARED: dict[str, Setting] = {"icl": "icl", "ft": "ft"}


def share_name(update: str, part: Part) -> str:
    """What `Comparison.norms` calls the share of a part in the squared norm of an update.

    Args:
        update: ``"icl"`` or ``"ft"``.
        part: which.
    """
    return f"{update}_{part}_share"


def join_norms(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The norms of successive groups of queries.

    Args:
        parts: one for each group.
    """
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
