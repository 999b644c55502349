"""A prompt as token ids, with the spans that make up S, D and Q."""

from __future__ import annotations

from dataclasses import dataclass

from metaopt_lens._errors import SpanError
from metaopt_lens._types import TokenSpan


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids and the partition of their positions into S, D and Q (docs/theory.md, section 1).

    `demos` are the demonstrations, each with the separator that follows it; `demo_inputs` and `labels` lie
    inside them. A label's span includes the space that precedes it and excludes the separator. `tokens` are
    for reading: a token that is no whole character is given in the tokenizer's own spelling.
    `matches_whole_string` says whether tokenising the whole text at once gives the same ids;
    `zero_shot_matches_whole_string` says it for the prompt that `zero_shot` returns.
    `bos_note` says whether BOS stands first and who decided it; `warning` that the model's own tokenizer call gives
    other ids, and why (None where it gives the same).
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    bos: TokenSpan | None
    instruction: TokenSpan | None
    demos: tuple[TokenSpan, ...]
    demo_inputs: tuple[TokenSpan, ...]
    labels: tuple[TokenSpan, ...]
    query: TokenSpan
    matches_whole_string: bool
    zero_shot_matches_whole_string: bool
    bos_note: str = ""
    warning: str | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.ids):
            raise SpanError(f"each id needs one token string, got {len(self.ids)} ids, {len(self.tokens)} tokens.")
        position = 0
        for span in (self.bos, self.instruction, *self.demos, self.query):
            if span is None:
                continue
            if span.start != position:
                raise SpanError(
                    f"BOS, instruction, demonstrations and query must follow each other without gap or "
                    f"overlap: expected a span that starts at {position}, got {span}."
                )
            position = span.stop
        if position != len(self.ids):
            raise SpanError(f"the spans must cover all {len(self.ids)} tokens, they end at {position}.")
        if not len(self.query):
            raise SpanError("the query needs at least one token.")
        if not len(self.demos) == len(self.demo_inputs) == len(self.labels):
            raise SpanError(
                f"each demonstration needs one input span and one label span, got {len(self.demos)} "
                f"demonstrations, {len(self.demo_inputs)} inputs, {len(self.labels)} labels."
            )
        for i, (demo, text, label) in enumerate(zip(self.demos, self.demo_inputs, self.labels, strict=True)):
            if not (text.start == demo.start and text.stop == label.start and label.stop <= demo.stop):
                raise SpanError(f"demonstration {i} must be an input, then a label, then a separator.")

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def prefix(self) -> TokenSpan:
        """S: what precedes the demonstrations and the zero-shot prompt has too (BOS, instruction)."""
        return TokenSpan(0, self.demonstrations.start)

    @property
    def demonstrations(self) -> TokenSpan:
        """D: all demonstrations; an empty span just before the query if there are none."""
        start = self.demos[0].start if self.demos else self.query.start
        return TokenSpan(start, self.query.start)

    def zero_shot(self) -> TokenizedPrompt:
        """The prompt on Z = S and Q, with the very ids it has here (nothing is tokenised again)."""
        removed = len(self.demonstrations)
        if not self.demos:
            return self
        start, stop = self.demonstrations.start, self.demonstrations.stop
        return TokenizedPrompt(
            ids=self.ids[:start] + self.ids[stop:],
            tokens=self.tokens[:start] + self.tokens[stop:],
            bos=self.bos,
            instruction=self.instruction,
            demos=(),
            demo_inputs=(),
            labels=(),
            query=TokenSpan(self.query.start - removed, self.query.stop - removed),
            matches_whole_string=self.zero_shot_matches_whole_string,
            zero_shot_matches_whole_string=self.zero_shot_matches_whole_string,
            bos_note=self.bos_note,
            warning=self.warning,
        )
