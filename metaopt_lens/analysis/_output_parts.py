"""Where in output space updates lie: contrast of the label words, format, rest (docs/theory.md, section 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import PromptError
from metaopt_lens.models import LensModel

Part = Literal["contrast", "format", "rest"]
PARTS: tuple[Part, ...] = ("contrast", "format", "rest")


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Orthonormal bases, as columns; the rest is what is orthogonal to both.

    Attributes:
        contrast: of the span of all differences of label directions: which label.
        format: of what their mean adds to it (one column, or none): that a label is answered at all.
    """

    contrast: Float[Tensor, "d_model _"]
    format: Float[Tensor, "d_model _"]

    @classmethod
    def of(cls, directions: Float[Tensor, "label d_model"]) -> Subspaces:
        """The subspaces of some label directions.

        Args:
            directions: of the labels, in the residual stream.
        """
        directions = directions.double()
        mean = directions.mean(0)
        contrast = _basis(directions - mean, directions)
        return cls(contrast, _basis((mean - contrast @ (contrast.mT @ mean))[None], directions))

    def coordinates(self, vectors: Float[Tensor, "*item d_model"], part: Part) -> Float[Tensor, "*item rank"]:
        """A part of vectors of the residual stream: its lengths and angles are those of the orthogonal projection.

        Args:
            vectors: along the last axis.
            part: which.
        """
        vectors = vectors.double()
        if part != "rest":
            return vectors @ (self.contrast if part == "contrast" else self.format)
        both = torch.cat([self.contrast, self.format], dim=1)
        return vectors - (vectors @ both) @ both.mT

    def dims(self, part: Part) -> int:
        """Dimensions of a part.

        Args:
            part: which.
        """
        found = {"contrast": self.contrast.shape[1], "format": self.format.shape[1]}
        return found.get(part, len(self.contrast) - sum(found.values()))


def _basis(rows: Float[Tensor, "row d_model"], like: Float[Tensor, "label d_model"]) -> Float[Tensor, "d_model _"]:
    """Orthonormal basis of the rows' span; what is rounding next to `like` does not count."""
    _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = vectors[sizes > 1e-9 * like.norm()].mT
    return basis


def label_subspaces(model: LensModel, labels: Sequence[int], layer: int) -> Subspaces:
    """Contrast and format of label words in the output space of a layer's attention.

    Directions are the effective ones (section 8), without the scale of the final norm; a norm after attention is
    counted to the directions, its scale left out too: scales change no subspace.

    Args:
        model: a wrapped model.
        labels: first tokens of the label words.
        layer: whose attention writes.

    Raises:
        PromptError: see `check_labels`.
    """
    check_labels(labels, model.info.d_model)
    directions = model.head.w_u.detach()[:, list(dict.fromkeys(labels))].mT.double().cpu()
    ones = torch.ones_like(directions[:, 0])
    for norm in (model.head.fixed_norm, model.norm_after_attention(layer)):
        directions = directions if norm is None else norm.pulled_back(directions, ones).detach()
    return Subspaces.of(directions)


def check_labels(labels: Sequence[int], d_model: int) -> None:
    """Refuse label words that have no contrast, or so many that nothing else is left.

    Args:
        labels: first tokens of the label words.
        d_model: width of the residual stream.

    Raises:
        PromptError: fewer than two different first tokens, or more than `d_model`.
    """
    n = len(set(labels))
    if n < 2:
        raise PromptError(
            f"contrast needs label words with at least 2 different first tokens, got {n}: give candidates that "
            "differ in their first token."
        )
    if n > d_model:
        raise PromptError(
            f"{n} label words are more than the {d_model} dimensions of the residual stream, so nothing is left "
            "outside their span: give each query fewer candidates."
        )
