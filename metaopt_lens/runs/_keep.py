"""What a pass keeps, and of which rows."""

from __future__ import annotations

from dataclasses import dataclass

from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._prompt_run import Setting


@dataclass(frozen=True)
class Keep:
    """What a run keeps beyond its attention.

    Attributes:
        residual: residual stream before every block and after the last.
        attention_input: what the projections read.
        raw_q: queries before rotary and QK-norm.
        own_stream: residual stream before every block at all tokens of the query, of the run ``"zs_matched"`` only.
        stream: the residual stream's ends and what the MLPs write.
        logits: token ids whose logits at the destinations are wanted, with the log-normaliser and their ranks.
        n_top: how many of the most probable next tokens are wanted too, where logits are.
    """

    residual: bool = False
    attention_input: bool = False
    raw_q: bool = False
    own_stream: bool = False
    stream: bool = False
    logits: tuple[int, ...] = ()
    n_top: int = 0

    @property
    def whole_pass(self) -> bool:
        """Whether a pass must continue after the last layer's attention."""
        return self.residual or self.stream or bool(self.logits)


ATTENTION = Keep()


@dataclass(frozen=True)
class Row:
    """One sequence of a batch: the prompt of a setting, and the positions in it to keep."""

    setting: Setting
    tokens: TokenizedPrompt
    destinations: tuple[int, ...]
