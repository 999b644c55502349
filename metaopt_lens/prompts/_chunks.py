"""Cutting a text into sentences, lines or paragraphs whose joined texts are the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from metaopt_lens._errors import OptionError, PromptError

_KINDS = ("sentence", "line", "paragraph")

_BLANK_LINE = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE_END = re.compile(r"\n(?:[^\S\n]*\n)*")
# Punctuation with the quotes and brackets that close behind it, then white space and no lower-case letter; or the
# full-width marks, which no space follows.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s+[^\sa-z])|[。！？]+[”’」』）]*")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|No|Fig|Eq|Sec|vs|cf|al|etc|e\.g|i\.e|approx|Inc|Ltd|Co|U\.S)\.$"
)


def split_chunks(text: str, kind: str) -> tuple[str, ...]:
    """Cut a text; joined, the chunks are the text.

    Line ends belong to the chunk before them. Other white space belongs to the chunk behind it, as tokenizers have it.

    Args:
        text: what to cut.
        kind: ``"sentence"`` (at the ends of sentences, and at blank lines), ``"line"`` or ``"paragraph"`` (at blank
            lines).

    Raises:
        OptionError: another kind.
        PromptError: there is nothing but white space.
    """
    if kind not in _KINDS:
        raise OptionError(f"chunks must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}.")
    if not text.strip():
        raise PromptError("the context is empty: give the text that the query is asked behind.")
    borders = [0, *_borders(text, kind), len(text)]
    return tuple(text[start:stop] for start, stop in pairwise(borders))


def _borders(text: str, kind: str) -> Iterator[int]:
    """Where a new chunk begins, within the text."""
    found = {match.end() for match in (_LINE_END if kind == "line" else _BLANK_LINE).finditer(text)}
    if kind == "sentence":
        ends = (match.end() for match in _SENTENCE_END.finditer(text))
        found |= {_behind_line_ends(text, end) for end in ends if not _ABBREVIATION.search(text, 0, end)}
    yield from sorted(at for at in found if text[:at].strip() and text[at:].strip())


def _behind_line_ends(text: str, at: int) -> int:
    space = len(text) - len(text[at:].lstrip())
    line_end = text.rfind("\n", at, space)
    return at if line_end < 0 else line_end + 1
