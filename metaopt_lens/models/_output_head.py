"""From the last residual stream to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OutputHead:
    """Final norm, unembedding and soft-cap of a model.

    Attributes:
        norm: the host's own final norm, on ``[batch, pos, d_model]``.
        unembed: the host's own unembedding.
        norm_kind: ``"LN"``, ``"RMS"``, or None where there is no final norm.
        eps: under the root in its denominator; 0 without a norm.
        gain: what the norm multiplies with; None where it has none (any more).
        bias: what the norm adds; None where it has none (any more).
        w_u: the unembedding matrix.
        b_u: its bias; None where there is none.
        softcap: ``c`` in ``c tanh(logit / c)``; None where there is none.
    """

    norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]
    norm_kind: str | None
    eps: float
    gain: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
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
        rows = residual.reshape(1, -1, residual.shape[-1])  # [1, (batch), d_model]
        normed = self.norm(rows)
        if tokens is None:
            logits = self.unembed(normed)
        else:
            at = tokens.to(self.w_u.device)
            logits = normed.to(self.w_u.dtype) @ self.w_u[:, at]
            logits = logits if self.b_u is None else logits + self.b_u[at]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.reshape(*residual.shape[:-1], -1)  # [*batch, token]
