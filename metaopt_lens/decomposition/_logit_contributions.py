"""The result of `Decomposition.logits`: what every part of the model adds to the logit of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.runs import rank_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class LogitContributions(Stored):
    """Direct contributions to the answer's logit, which sum to it (docs/theory.md, section 8).

    The scale of the final norm, and of norms after attention, is held where this run has it, so the logit is a sum. A
    contribution is what a part writes in the answer's direction itself; what later layers make of it shows when it is
    knocked out. An answer of several tokens has a leading `step` axis, one step per token, each read where the token is
    predicted.

    Attributes:
        answer: the answer's tokens as text.
        versus: at each step the rivals, whose mean logit is subtracted.
        token_ids: at each step the answer's token id, and the rivals'.
        logit: the model's own logit, or difference of logits, before the soft-cap if there is one.
        embedding: of the residual stream before the first block.
        zero_shot, meta_gradient: of either part of every head.
        momentum: of the moving average, under momentum attention.
        attention_bias: of b_O and of the bias of a norm after attention.
        mlp: of every MLP.
        bias: of the final norm and the unembedding.
        per_demo: the meta-gradient's contribution split over the demonstrations.
        per_token: over all source tokens; sums to the meta-gradient's over D, to the zero-shot part's elsewhere.
        scale: of the final norm in this run; 1 where there is none.
        softcap: ``c`` of a final ``c tanh(logit / c)``, which comes after the contributions; None without one.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "logit contributions"

    answer: tuple[str, ...]
    versus: tuple[tuple[str, ...], ...]
    token_ids: tuple[tuple[int, tuple[int, ...]], ...]
    logit: Float[Tensor, "*step"]
    embedding: Float[Tensor, "*step"]
    zero_shot: Float[Tensor, "*step layer head"]
    meta_gradient: Float[Tensor, "*step layer head"]
    momentum: Float[Tensor, "*step layer head"] | None
    attention_bias: Float[Tensor, "*step layer"]
    mlp: Float[Tensor, "*step layer"]
    bias: Float[Tensor, "*step"]
    per_demo: Float[Tensor, "*step layer head demo"]
    per_token: Float[Tensor, "*step layer head src"]
    scale: Float[Tensor, "*step"]
    softcap: float | None
    provenance: dict[str, Any] = field(default_factory=provenance)

    @property
    def head_total(self) -> Float[Tensor, "*step layer head"]:
        """All that a head writes: both parts, and the moving average's under momentum attention."""
        parts = self.zero_shot + self.meta_gradient
        return parts if self.momentum is None else parts + self.momentum

    @property
    def total(self) -> Float[Tensor, "*step"]:
        """The sum of all contributions, which is `logit` up to rounding."""
        return (
            self.embedding + self.head_total.sum((-2, -1)) + self.attention_bias.sum(-1) + self.mlp.sum(-1) + self.bias
        )

    def heads(self, top: int | None = None, *, part: str = "total") -> list[HeadRef]:
        """Heads by the size of their contribution (mean over steps), largest first.

        Args:
            top: how many; all by default.
            part: ``"total"``, ``"zero_shot"`` or ``"meta_gradient"``.
        """
        values = part_of_contributions(self, part)
        # *step layer head -> (step) layer head
        return rank_heads(values.reshape(-1, *values.shape[-2:]).mean(0).abs(), top)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: one row per part of the model (and step), the contribution of either part of every head."""
        import pandas as pd

        rows = []
        n_steps = len(self.answer)
        for step in range(n_steps):
            at = (step,) if n_steps > 1 else ()
            about = {"step": step, "token": self.answer[step]}

            def row(name: str, part: str, value: Tensor, about: dict[str, object] = about) -> None:
                rows.append({**about, "name": name, "part": part, "contribution": float(value)})

            row("embedding", "embedding", self.embedding[at])
            n_layers, n_heads = self.zero_shot.shape[-2:]
            for layer in range(n_layers):
                for head in range(n_heads):
                    name = str(HeadRef(layer, head))
                    row(name, "zero_shot", self.zero_shot[(*at, layer, head)])
                    row(name, "meta_gradient", self.meta_gradient[(*at, layer, head)])
                    if self.momentum is not None:
                        row(name, "momentum", self.momentum[(*at, layer, head)])
                row(f"attention bias {layer}", "attention_bias", self.attention_bias[(*at, layer)])
                row(f"MLP {layer}", "mlp", self.mlp[(*at, layer)])
            row("bias", "bias", self.bias[at])
        return pd.DataFrame(rows)

    def _summaries(self) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
        """At each step a heading, sums over the model's parts, and the strongest heads of either part of a head."""
        for step, (token, rivals) in enumerate(zip(self.answer, self.versus, strict=True)):
            at = (step,) if len(self.answer) > 1 else ()
            against = f" minus the mean of {', '.join(map(repr, rivals))}" if rivals else ""
            cap = "" if self.softcap is None else f", before the soft-cap at {self.softcap:g}"
            sums = {
                "embedding": self.embedding[at],
                "heads, reading the query": self.zero_shot[at].sum(),
                "heads, reading the demonstrations": self.meta_gradient[at].sum(),
                "MLPs": self.mlp[at].sum(),
                "biases": self.attention_bias[at].sum() + self.bias[at],
            }
            if self.momentum is not None:
                sums["momentum"] = self.momentum[at].sum()
            strongest = {}
            for part in ("zero_shot", "meta_gradient"):
                values = getattr(self, part)[at]
                refs = rank_heads(values.abs(), 5)
                strongest[part] = ", ".join(f"{ref} {float(values[ref.layer, ref.head]):+.3f}" for ref in refs)
            heading = f"Logit of {token!r}{against}: {float(self.logit[at]):+.3f}{cap}"
            yield heading, {name: f"{float(value):+.3f}" for name, value in sums.items()}, strongest

    def __repr__(self) -> str:
        lines = []
        for heading, sums, strongest in self._summaries():
            lines += [heading, "  " + ", ".join(f"{name} {value}" for name, value in sums.items())]
            lines += [f"  {part}: {heads}" for part, heads in strongest.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "".join(
            f"<b>{escape(heading)}</b><table>"
            + "".join(f"<tr><td>{escape(name)}</td><td>{value}</td></tr>" for name, value in (sums | strongest).items())
            + "</table>"
            for heading, sums, strongest in self._summaries()
        )


def part_of_contributions(found: LogitContributions, part: str) -> Float[Tensor, "*step layer head"]:
    """The contributions of one part of every head.

    Args:
        found: contributions.
        part: ``"total"``, ``"zero_shot"`` or ``"meta_gradient"``.

    Raises:
        OptionError: another part.
    """
    known = {"total": found.head_total, "zero_shot": found.zero_shot, "meta_gradient": found.meta_gradient}
    if part not in known:
        raise OptionError(f"part must be 'total', 'zero_shot' or 'meta_gradient', got {part!r}.")
    return known[part]
