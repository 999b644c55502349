"""Take the demonstrations away from chosen heads in a full in-context run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.interventions._change import Change, Visibility
from metaopt_lens.interventions._demo_tokens import DemoTokens
from metaopt_lens.interventions._heads import Heads, head_mask
from metaopt_lens.interventions._meta_gradient import MetaGradient
from metaopt_lens.interventions._pipeline import Staged
from metaopt_lens.models import HostPass, LensModel
from metaopt_lens.prompts import ICLPrompt, PromptLike, TokenizedPrompt, as_prompt


@dataclass(frozen=True, eq=False)
class KnockOut(Staged):
    """In a full in-context run, chosen heads attend as if the demonstrations were not there: ``z <- z_without``.

    Equals putting the scores from those positions to the demonstrations at -inf, in the chosen heads. With all heads
    and all positions of the query it is the position-matched zero-shot run (docs/theory.md, section 5). With one
    demonstration it is leaving that one out by masking: later demonstrations keep what they read from it.

    Attributes:
        prompt: what the run begins with: a prompt (in the forms `decompose` takes; its query does not matter) or a
            meta-gradient.
        heads: heads to knock out, as in ``["L3H7"]``; None for all.
        layers: only in these layers.
        demos: which demonstrations to hide, counted from 0; None for all.
        positions: where: ``"query"`` (every token after the demonstrations), ``"last"`` (the last token of the pass),
            or indices counted from the query's first token.
    """

    prompt: PromptLike | TokenizedPrompt | MetaGradient
    heads: Heads = None
    layers: Sequence[int] | None = None
    demos: Sequence[int] | None = None
    positions: str | Sequence[int] = "query"

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str | ICLPrompt | Mapping | TokenizedPrompt | MetaGradient):
            raise OptionError(
                f"KnockOut needs what the run begins with before its heads: KnockOut(prompt, {self.prompt!r}), with a "
                "prompt or a meta-gradient."
            )
        if isinstance(self.positions, str):
            if self.positions not in {"query", "last"}:
                raise OptionError(f"positions must be 'query', 'last' or token indices, got {self.positions!r}.")
        elif not self.positions or min(self.positions) < 0:
            raise OptionError(
                "positions must be at least one index, counted from the query's first token (0), got "
                f"{list(self.positions)}."
            )

    def change(self, model: LensModel) -> Change:
        """The demonstrations, hidden from the chosen heads.

        Args:
            model: a wrapped model.

        Raises:
            HeadError, OptionError: unknown heads, layers or demonstrations, or an empty selection.
            ModelMismatchError: the meta-gradient was made with another model.
        """
        tokens = self._tokens(model)
        mask = head_mask(model.info, self.heads, self.layers)
        demos = range(len(tokens.spans)) if self.demos is None else tokens.check_demos(self.demos)
        inside = tokens.mask(tuple(demos), tokens.stop)

        def place(host_pass: HostPass) -> None:
            tokens.check_begins(host_pass, tokens.stop, "the demonstrations' prompt")

        def hidden(host_pass: HostPass) -> Bool[Tensor, "batch dst slot"]:
            """Destinations outside `positions` keep all sources: D itself must not be left without any."""
            index, valid = host_pass.index, host_pass.valid
            away = inside.to(index.device)[index.clamp_max(tokens.stop - 1)] & (index < tokens.stop) & valid
            where = self._where(index[:, host_pass.n_past :], valid[:, host_pass.n_past :], tokens.stop)
            return where[:, :, None] & away[:, None]

        return Change(visibility=Visibility("a knock-out", mask, place=place, hidden=hidden))

    def _tokens(self, model: LensModel) -> DemoTokens:
        if isinstance(self.prompt, MetaGradient):
            self.prompt.check_model(model)
            return self.prompt.tokens
        if isinstance(self.prompt, TokenizedPrompt):
            return DemoTokens.of(self.prompt)
        return DemoTokens.tokenize(as_prompt(self.prompt), model)

    def _where(
        self, index: Int[Tensor, "batch dst"], valid: Bool[Tensor, "batch dst"], stop: int
    ) -> Bool[Tensor, "batch dst"]:
        in_query = index >= stop
        if isinstance(self.positions, str):
            if self.positions == "query":
                return in_query
            last = index.masked_fill(~valid, -1).max(1, keepdim=True).values
            return in_query & valid & (index == last)
        wanted = torch.tensor(list(self.positions), device=index.device) + stop
        return in_query & torch.isin(index, wanted)
