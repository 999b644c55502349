"""What is run of a prompt: destinations, and groups that share their demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from metaopt_lens._errors import OptionError, SpanError
from metaopt_lens.prompts import TokenizedPrompt

Position = int | Literal["last", "all"]


def destinations_of(tokens: TokenizedPrompt, position: Position) -> tuple[int, ...]:
    """Positions of the query, as indices into the prompt.

    Args:
        tokens: a prompt.
        position: ``"last"``, ``"all"`` positions of the query, or an index into the prompt (negative from its end).

    Raises:
        SpanError: not in the query. OptionError: none of these.
    """
    if position == "last":
        return (tokens.n_tokens - 1,)
    if position == "all":
        return tuple(range(tokens.query.start, tokens.query.stop))
    if not isinstance(position, int):
        raise OptionError(f"position must be 'last', 'all' or a token index, got {position!r}.")
    index = position + tokens.n_tokens if position < 0 else position
    if index not in tokens.query:
        raise SpanError(
            f"position {position} is not in the query, which holds positions {tokens.query.start} to "
            f"{tokens.query.stop - 1} of this prompt."
        )
    return (index,)


def prompt_groups(prompts: Sequence[TokenizedPrompt]) -> list[list[int]]:
    """Indices of prompts with the same tokens up to the query, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = (prompt.ids[: prompt.query.start], prompt.demonstrations)
        groups.setdefault(key, []).append(index)
    return list(groups.values())
