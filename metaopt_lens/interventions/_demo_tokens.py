"""Where S and the demonstrations stand in an in-context prompt, and what a host pass must begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from metaopt_lens._errors import OptionError, SpanError
from metaopt_lens._types import TokenSpan
from metaopt_lens.models import HostPass, LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt
from metaopt_lens.runs import tokenize_for


@dataclass(frozen=True)
class DemoTokens:
    """Ids of S and D, and the demonstrations' spans.

    Attributes:
        ids: S, then D.
        start: where D begins (the length of S).
        spans: one for each demonstration, its separator included.
    """

    ids: tuple[int, ...]
    start: int
    spans: tuple[TokenSpan, ...]

    @classmethod
    def of(cls, prompt: TokenizedPrompt) -> DemoTokens:
        """Those of a prompt, its query left out."""
        d = prompt.demonstrations
        return cls(ids=prompt.ids[: d.stop], start=d.start, spans=prompt.demos)

    @classmethod
    def tokenize(cls, prompt: ICLPrompt, model: LensModel, *, prepend_bos: bool | None = None) -> DemoTokens:
        """Those of a prompt as this model's tokenizer reads it."""
        return cls.of(tokenize_for(model, prompt, prepend_bos=prepend_bos, require_demos=True))

    @property
    def stop(self) -> int:
        """Where D ends and a query begins."""
        return len(self.ids)

    @property
    def n_demo_tokens(self) -> int:
        """Length of D."""
        return self.stop - self.start

    def check_demos(self, demos: Sequence[int]) -> tuple[int, ...]:
        """The demonstrations asked for, sorted; raises `OptionError` for none or one that is not there."""
        if not demos:
            raise OptionError("the selection is empty: name at least one demonstration (counted from 0).")
        for demo in demos:
            if not 0 <= demo < len(self.spans):
                raise OptionError(f"there is no demonstration {demo}: there are {len(self.spans)}, counted from 0.")
        return tuple(sorted(set(demos)))

    def mask(self, demos: Sequence[int], n: int) -> Bool[Tensor, " src"]:
        """Which of the first `n` positions of the in-context prompt belong to these demonstrations."""
        inside = torch.zeros(n, dtype=torch.bool)
        for demo in demos:
            inside[self.spans[demo].slice] = True
        return inside

    def check_begins(self, host_pass: HostPass, n: int, what: str) -> None:
        """Raise `SpanError` unless every sequence of a fresh pass begins with the first `n` ids."""
        if host_pass.tokens is None or host_pass.n_past or not n:
            return
        index = host_pass.index
        wanted = torch.tensor(self.ids, device=index.device)[index.clamp_max(n - 1)]
        wrong = (wanted != host_pass.tokens.to(index.device)) & host_pass.valid & (index < n)
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            found = host_pass.tokens[row][host_pass.valid[row]][:n].tolist()
            raise SpanError(
                f"every sequence must begin with {what}, token ids {list(self.ids[:n])[:12]}; sequence {row} begins "
                f"with {found[:12]}. Put BOS and instruction in front as before the demonstrations, and mark padding "
                "with attention_mask."
            )
