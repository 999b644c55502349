"""A prompt cut into what stands before the demonstrations, each demonstration, and the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from metaopt_lens._types import TokenSpan
from metaopt_lens.prompts import TokenizedPrompt

_BANDS = ("#f2a541", "#5b8def", "#54b689", "#d66ba0", "#8f7ae5", "#4bb3c4", "#d9775a", "#9aa83a")
_PLAIN, _QUERY = "#9aa5b1", "#1f2933"
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥"})


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens with a name and the colour of its band."""

    name: str
    kind: Literal["before", "demo", "query"]
    span: TokenSpan
    colour: str


def segments(tokenized: TokenizedPrompt) -> list[Segment]:
    """All tokens of a prompt, in order."""
    found = []
    if tokenized.bos is not None:
        found.append(Segment("start", "before", tokenized.bos, _PLAIN))
    if tokenized.instruction is not None:
        found.append(Segment("instruction", "before", tokenized.instruction, _PLAIN))
    found += [Segment(f"demo {i + 1}", "demo", span, demo_colour(i)) for i, span in enumerate(tokenized.demos)]
    return [*found, Segment("query", "query", tokenized.query, _QUERY)]


def demo_colour(index: int) -> str:
    """Band colour of a demonstration (from 0); neighbours differ."""
    return _BANDS[index % len(_BANDS)]


def visible_token(token: str) -> str:
    """The token with line ends and tabs as signs, and a sign for every space where nothing else is in it."""
    return token.translate(_VISIBLE) if token.strip(" ") else "␣" * len(token)
