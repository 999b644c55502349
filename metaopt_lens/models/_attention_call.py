"""One layer's attention in a running forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import ScoreRule, attend, attention_scores, softmax_with_sink, visible_sources


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's attention in any forward pass, seen just before W_O.

    Sources are what was computed before (a shared prefix, the host's cache), followed by the tokens of this pass;
    destinations are the tokens of this pass. Positions are one row for all sequences, or one row for each.

    Attributes:
        layer: which.
        q, k: as the scores see them (after QK-norm and rotary).
        v: values.
        z: the heads' outputs before W_O.
        rule: how the layer scores.
        dst_positions: where the destinations stand.
        src_positions: where the sources stand.
        padded: sources that are padding; None where none is.
        host_pattern: attention probabilities as the host's own hook shows them; None where it does not, before z.
    """

    layer: int
    q: Float[Tensor, "batch dst head d_head"]
    k: Float[Tensor, "batch src kv_head d_head"]
    v: Float[Tensor, "batch src kv_head d_head"]
    z: Float[Tensor, "batch dst head d_head"]
    rule: ScoreRule
    dst_positions: Int[Tensor, "*rows dst"]
    src_positions: Int[Tensor, "*rows src"]
    padded: Bool[Tensor, "batch src"] | None = None
    host_pattern: Float[Tensor, "batch head dst src"] | None = None

    @property
    def offset(self) -> int:
        """How many sources come before the tokens of this pass."""
        return int(self.k.shape[1] - self.q.shape[1])

    @property
    def valid(self) -> Bool[Tensor, "*rows src"]:
        """Sources that are no padding."""
        return torch.ones_like(self.src_positions, dtype=torch.bool) if self.padded is None else ~self.padded

    @cached_property
    def pattern(self) -> Float[Tensor, "batch head dst src"]:
        """The attention probabilities: the host's own, or rebuilt from q and k where it shows none."""
        if self.host_pattern is not None:
            return self.host_pattern
        return softmax_with_sink(self.scores(), self.rule.sinks)[0]

    @property
    def visible(self) -> Bool[Tensor, "*rows dst src"]:
        """Causal and window mask."""
        return visible_sources(self.rule, self.dst_positions, self.src_positions)

    def scores(self) -> Float[Tensor, "batch head dst src"]:
        """Final scores before the softmax, from q and k; ``-inf`` for what is not visible.

        Padding sees itself, so that no row is empty.
        """
        scores = attention_scores(
            self.rule, self.q, self.k, dst_positions=self.dst_positions, src_positions=self.src_positions
        )
        if self.padded is None:
            return scores
        itself = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        itself = itself.triu(self.offset).tril(self.offset)
        return scores.masked_fill((self.padded[:, None, :] & ~itself)[:, None], -torch.inf)

    def inside(self, span: TokenSpan) -> Bool[Tensor, " src"]:
        """A span of sources, as a mask over all of them.

        Args:
            span: sources, counted from the first.
        """
        mask = torch.zeros(self.k.shape[1], dtype=torch.bool, device=self.k.device)
        mask[span.slice] = True
        return mask

    def attend(
        self, hidden: Bool[Tensor, "*hidden src"] | None = None
    ) -> tuple[
        Float[Tensor, "batch dst head d_head"], Float[Tensor, "batch head dst src"], Float[Tensor, "batch head dst"]
    ]:
        """z, pattern and what goes to the sink, with some sources hidden: ``z_without``, q, k and v unchanged.

        Taken from the scores rather than from the pattern: half-precision patterns flush small probabilities to 0.

        Args:
            hidden: sources to hide, broadcast against ``[batch, head, dst, src]``; None hides nothing.
        """
        z, pattern, sink = attend(self.scores(), self.v, sinks=self.rule.sinks, hidden=hidden)
        return z.to(self.z.dtype), pattern, sink

    def without(self, hidden: Bool[Tensor, " src"]) -> AttentionCall:
        """The call with some sources left out, as if they were not there; its scores are those of the others.

        Args:
            hidden: which; none of this pass's own tokens.
        """
        kept = ~hidden
        return replace(
            self,
            k=self.k[:, kept],
            v=self.v[:, kept],
            src_positions=self.src_positions[..., kept],
            padded=None if self.padded is None else self.padded[:, kept],
            host_pattern=None,
        )

    def rows(self, batch: slice | Int[Tensor, " row"]) -> AttentionCall:
        """Some sequences of the batch.

        Args:
            batch: which.
        """

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[batch]

        def own(positions: Tensor) -> Tensor:
            return positions if positions.ndim == 1 else positions[batch]

        return replace(
            self,
            q=self.q[batch],
            k=self.k[batch],
            v=self.v[batch],
            z=self.z[batch],
            dst_positions=own(self.dst_positions),
            src_positions=own(self.src_positions),
            padded=some(self.padded),
            host_pattern=some(self.host_pattern),
        )
