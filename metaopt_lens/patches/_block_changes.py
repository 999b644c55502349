"""What a patch adds in one block: a row of factors for every token, or the same factors for all."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaopt_lens.dual import rank_one_product
from metaopt_lens.models import ExpertsSite
from metaopt_lens.patches._changes import Rows
from metaopt_lens.patches._placing import PatchedRows

OUT_MATRICES = ("out", "o", "expert_out")


@dataclass(frozen=True, eq=False)
class TokenChanges:
    """One block's changes, a row for every token; see `Changes`.

    Attributes:
        placing: says which row belongs to which token of the running pass.
        left: left factors by matrix; see `WeightPatch`.
        right: right factors.
        other: ``"scale"``, or ``"shift"`` and ``"chosen"`` of `ExpertChanges`.
        experts: of a mixture of experts.
    """

    placing: PatchedRows
    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    experts: ExpertsSite | None = None

    def product(self, matrix: str, x: Rows, product: Rows) -> Rows:  # noqa: ARG002 - see `Changes`
        return self._rank_one(x, self.left[matrix], self.right["in"])

    def output(self, hidden: Rows, out: Rows) -> Rows:  # noqa: ARG002
        (left,) = (self.left[name] for name in OUT_MATRICES if name in self.left)
        return self._rank_one(hidden, left, self.right["out"])

    def scaled(self, normalized: Rows, out: Rows) -> Rows:  # noqa: ARG002
        scale = self.other["scale"]
        return self._own(normalized, normalized.to(scale) * self._of_tokens(scale, normalized))

    def experts_input(self, x: Rows) -> Rows:
        return self._rank_one(x, self.other["shift"], self.right["in"])

    def experts_output(self, x: Rows, out: Rows) -> Rows:
        assert self.experts is not None
        chosen = self._of_tokens(self.other["chosen"], x)
        hidden = self.experts.hidden(x, chosen)
        weights, active = self.experts.route(x)
        weight = torch.where(active == chosen[:, None], weights, 0.0).sum(-1, keepdim=True)
        return weight.to(self.left["expert_out"]) * self.output(hidden, out)

    def _rank_one(self, x: Rows, left: Tensor, right: Tensor) -> Rows:
        product = rank_one_product(x.to(left), self._of_tokens(left, x), self._of_tokens(right, x))
        return self._own(x, product)

    def _of_tokens(self, factor: Tensor, x: Tensor) -> Tensor:
        """The factor's row of every token; any row where a token has none."""
        return factor.to(x.device)[self.placing.rows.to(x.device).clamp_min(0)]

    def _own(self, x: Tensor, added: Rows) -> Rows:
        """Nothing is added where a token has no row."""
        return torch.where((self.placing.rows.to(x.device) >= 0)[:, None], added, 0.0)


@dataclass(frozen=True, eq=False)
class StaticChanges:
    """One block's changes, the same for every token behind S; see `Changes`.

    Attributes:
        placing: says which tokens stand behind S.
        left: left factors by matrix, one in a row.
        right: right factors.
        scale: change of the norm's scale.
    """

    placing: PatchedRows
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    scale: Tensor | None

    def product(self, matrix: str, x: Rows, product: Rows) -> Rows:  # noqa: ARG002 - see `Changes`
        return self._times(x, self.left[matrix], self.right["in"])

    def output(self, hidden: Rows, out: Rows) -> Rows:  # noqa: ARG002
        (left,) = (self.left[name] for name in OUT_MATRICES if name in self.left)
        return self._times(hidden, left, self.right["out"])

    def scaled(self, normalized: Rows, out: Rows) -> Rows:  # noqa: ARG002
        assert self.scale is not None
        scale = self.scale.to(normalized.device)
        return self._own(normalized.to(scale) * scale)

    def experts_input(self, x: Rows) -> Rows:  # noqa: ARG002
        raise AssertionError("a mixture of experts has no static patch")

    def experts_output(self, x: Rows, out: Rows) -> Rows:  # noqa: ARG002
        raise AssertionError("a mixture of experts has no static patch")

    def _times(self, x: Rows, left: Tensor, right: Tensor) -> Rows:
        left, right = left.to(x.device), right.to(x.device)
        return self._own((x.to(left) @ right.mT) @ left)

    def _own(self, added: Rows) -> Rows:
        return torch.where((self.placing.rows.to(added.device) >= 0)[:, None], added, 0.0)
