"""From the last residual stream to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.models._fixed_norm import FixedNorm


@dataclass(frozen=True, eq=False)
class OutputHead:
    """Final norm, unembedding and soft-cap of a model.

    Attributes:
        norm: the host's own final norm, on ``[batch, pos, d_model]``.
        unembed: the host's own unembedding.
        fixed_norm: that norm, read off as a linear map with a scale; None where there is no final norm.
        w_u: the unembedding matrix.
        b_u: its bias; None where there is none.
        softcap: ``c`` in ``c tanh(logit / c)``; None where there is none.
    """

    norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]
    fixed_norm: FixedNorm | None
    w_u: Float[Tensor, "d_model d_vocab"]
    b_u: Float[Tensor, " d_vocab"] | None
    softcap: float | None

    def logits(
        self, residual: Float[Tensor, "*batch d_model"], tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "*batch token"]:
        """Logits of the whole vocabulary, or of some tokens only.

        Args:
            residual: any residual stream.
            tokens: ids; None for the whole vocabulary.
        """
        logits = self.before_cap(residual, tokens)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def before_cap(
        self, residual: Float[Tensor, "*batch d_model"], tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "*batch token"]:
        """The same logits before the soft-cap, where there is one.

        Args:
            residual: any residual stream.
            tokens: ids; None for the whole vocabulary.
        """
        rows = residual.reshape(1, -1, residual.shape[-1])  # [1, (batch), d_model]
        normed = self.norm(rows)
        if tokens is None:
            logits = self.unembed(normed)
        else:
            at = tokens.to(self.w_u.device)
            logits = normed.to(self.w_u.dtype) @ self.w_u[:, at]
            logits = logits if self.b_u is None else logits + self.b_u[at]
        return logits.reshape(*residual.shape[:-1], -1)  # [*batch, token]
