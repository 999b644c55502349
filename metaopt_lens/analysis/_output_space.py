"""What a model's output projections make of head outputs, in as few numbers as say everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis._output_parts import Part, Subspaces, label_subspaces
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.models import LensModel
from metaopt_lens.runs import all_heads_output

Labels = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class OutputSpace:
    """The output projections of a model.

    Attributes:
        model: never modified.
    """

    model: LensModel

    @cached_property
    def _triangles(self) -> list[Float[Tensor, "head rank d_head"]]:
        """R of ``W_O^T = Q R``, of every layer."""
        weights = [self.model.w_o(layer).detach().double().cpu() for layer in range(self.model.info.n_layers)]
        return [torch.linalg.qr(weight.mT, mode="r").R for weight in weights]

    def coordinates(self, z: Float[Tensor, "query layer head d_head"]) -> Float[Tensor, "query layer head rank"]:
        """Parts of z in each head's output space: lengths and angles are those after W_O, in the residual stream.

        Args:
            z: in d_head, on the CPU, in float64.
        """
        return _per_layer(z, self._triangles)

    @cached_property
    def _label_maps(self) -> dict[tuple[Labels, Part], list[Float[Tensor, "head rank d_head"]]]:
        return {}

    @cached_property
    def _subspaces(self) -> dict[Labels, list[Subspaces]]:
        return {}

    def subspaces(self, labels: Labels) -> list[Subspaces]:
        """Contrast and format of label words, of every layer.

        Args:
            labels: first tokens of the words.

        Raises:
            PromptError: there is one word, or there are more than dimensions.
        """
        if labels not in self._subspaces:
            layers = range(self.model.info.n_layers)
            self._subspaces[labels] = [label_subspaces(self.model, labels, layer) for layer in layers]
        return self._subspaces[labels]

    def part(
        self, z: Float[Tensor, "query layer head d_head"], labels: Sequence[Labels], part: Part
    ) -> Float[Tensor, "query layer head rank"]:
        """A part of z after W_O, in coordinates with its lengths and angles; the last axis is filled with 0.

        Args:
            z: in d_head, on the CPU, in float64.
            labels: of every query, the first tokens of its label words.
            part: which.
        """
        return _by_labels(z, labels, lambda rows, own: _per_layer(rows, self._maps(own, part)))

    def stream_part(
        self, written: Float[Tensor, "query layer 1 d_model"], labels: Sequence[Labels], part: Part
    ) -> Float[Tensor, "query layer 1 rank"]:
        """A part of what whole layers write; the last axis is filled with 0.

        Args:
            written: in the residual stream.
            labels: of every query, the first tokens of its label words.
            part: which.
        """

        def project(rows: Tensor, own: Labels) -> Tensor:
            found = enumerate(self.subspaces(own))
            return torch.stack([spaces.coordinates(rows[:, i], part) for i, spaces in found], dim=1)

        return _by_labels(written, labels, project)

    def _maps(self, labels: Labels, part: Part) -> list[Float[Tensor, "head rank d_head"]]:
        """Of every layer, what makes coordinates in a part out of z."""
        if (labels, part) not in self._label_maps:
            found = []
            for layer, spaces in enumerate(self.subspaces(labels)):
                written = spaces.coordinates(self.model.w_o(layer).detach().double().cpu(), part)
                found.append(torch.linalg.qr(written.mT, mode="r").R if part == "rest" else written.mT)
            self._label_maps[labels, part] = found
        return self._label_maps[labels, part]

    def attention(
        self, z: Float[Tensor, "query layer head d_head"], update: WeightUpdate | None
    ) -> Float[Tensor, "query layer d_model"]:
        """All heads of every layer together, after W_O and b_O.

        Args:
            z: head outputs.
            update: what the model has that made them, if anything.
        """
        w_o, b_o = (None, None) if update is None else (update.w_o, update.b_o)
        return all_heads_output(self.model, z, w_o=w_o, b_o=b_o)


def _per_layer(
    z: Float[Tensor, "query layer head d_head"], maps: Sequence[Float[Tensor, "head rank d_head"]]
) -> Float[Tensor, "query layer head rank"]:
    return torch.stack([torch.einsum("qhd,hrd->qhr", z[:, i], m) for i, m in enumerate(_same_rank(maps, 1))], dim=1)


def _by_labels(vectors: Tensor, labels: Sequence[Labels], project: Callable[[Tensor, Labels], Tensor]) -> Tensor:
    """Queries with the same label words together."""
    rows: dict[int, Tensor] = {}
    for own in dict.fromkeys(labels):
        members = [row for row, other in enumerate(labels) if other == own]
        rows |= dict(zip(members, project(vectors[members].double(), own), strict=True))
    return torch.stack(_same_rank([rows[row] for row in range(len(labels))], -1))


def _same_rank(found: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Filled with 0 along an axis, to the longest."""
    longest = max(t.shape[axis] for t in found)

    def filled(t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[axis] = longest - shape[axis]
        return torch.cat([t, t.new_zeros(shape)], dim=axis)

    return [filled(t) for t in found]
