"""Which row of a patch belongs to which token of a forward pass, and where these tokens stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from metaopt_lens._errors import SpanError
from metaopt_lens.interventions import Change, DemoTokens, Visibility
from metaopt_lens.models import ExpertsSite, Hook, HostPass, LensModel
from metaopt_lens.patches._changes import Changes, change_hooks
from metaopt_lens.patches._site import patch_site


@dataclass(frozen=True, eq=False)
class PatchedRows:
    """Called before every pass: S stays where it is, what follows stands where it does in context and has its rows.

    Attributes:
        model: the wrapped model.
        tokens: S and the demonstrations.
        queries: ids of the tokens the patch was compiled for; None where it is for any.
    """

    model: LensModel
    tokens: DemoTokens
    queries: Sequence[int] | None
    _rows: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> Int[Tensor, " row"]:
        """Of every token of the pass, sequence after sequence, its row in the patch; -1 where it has none."""
        return self._rows[0]

    def __call__(self, host_pass: HostPass) -> Int[Tensor, "batch slot"]:
        self.tokens.check_begins(host_pass, self.tokens.start, "S, what stands before the demonstrations")
        index, n_past = host_pass.index, host_pass.n_past
        rows = torch.where(host_pass.valid, index - self.tokens.start, -1)[:, n_past:].clamp_min(-1)
        if self.queries is not None:
            self._check(host_pass, rows)
        self._rows[:] = [rows.flatten()]
        positions = torch.where(index >= self.tokens.start, index + self.tokens.n_demo_tokens, index)
        self.model.check_window(int(positions.max()) + 1, "the prompt, moved behind the demonstrations,")
        return positions

    def change_blocks(self, of_block: Callable[[int, ExpertsSite | None], Changes], precision: str) -> Change:
        """Every block's changes, made in any pass over tokens that stand where they do in context.

        Args:
            of_block: the changes of a block, given its number and, of a mixture of experts, its experts.
            precision: dtype that sums are made in.

        Raises:
            UnsupportedModelError: the model's tokens cannot be moved to their in-context positions.
        """
        self.model.check_movable()
        hooks: list[Hook] = []
        for layer in range(self.model.info.n_layers):
            site = patch_site(self.model, layer)
            hooks += change_hooks(site, of_block(layer, site.experts), getattr(torch, precision))
        return self.change(hooks)

    def change(self, hooks: Sequence[Hook]) -> Change:
        """Hooks on tokens that stand where they do in context; no head sees anything else for it.

        Args:
            hooks: of the blocks' changes.
        """
        none = torch.zeros(self.model.info.n_layers, self.model.info.n_heads, dtype=torch.bool)
        return Change(hooks=hooks, visibility=Visibility("a weight patch", none, place=self))

    def _check(self, host_pass: HostPass, rows: Int[Tensor, "batch pos"]) -> None:
        assert self.queries is not None
        n = len(self.queries)
        if int(rows.max()) >= n:
            raise SpanError(
                f"the patch has changes for {n} tokens behind S (positions {self.tokens.start} to "
                f"{self.tokens.start + n - 1} of the zero-shot prompt), and the pass has one at position "
                f"{self.tokens.start + int(rows.max())}: extend the patch with generate_without_prompt(...), or "
                "compile a prompt with the longer query."
            )
        if host_pass.tokens is None:
            return
        wanted = torch.tensor([*self.queries], device=rows.device)[rows.clamp_min(0)]
        wrong = ((wanted != host_pass.tokens.to(rows.device)) & (rows >= 0)).nonzero()
        if len(wrong):
            sequence, at = wrong[0].tolist()
            raise SpanError(
                "the patch was compiled for another prompt: every token has a change of its own, and at position "
                f"{self.tokens.start + int(rows[sequence, at])} of sequence {sequence} it was made for token id "
                f"{int(wanted[sequence, at])}, the pass has {int(host_pass.tokens[sequence, at])}. Compile this prompt."
            )
