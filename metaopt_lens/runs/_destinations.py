"""From prompts to what is run: tokens the model knows, destinations, groups that share their demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from metaopt_lens._errors import OptionError, PromptError, SpanError
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt, tokenize_prompt

Position = int | Literal["last", "all"]


def tokenize_for(
    model: LensModel,
    prompts: Sequence[ICLPrompt],
    *,
    prepend_bos: bool | None = None,
    require_demos: bool = True,
) -> list[TokenizedPrompt]:
    """Prompts as this model's tokenizer reads them.

    Args:
        model: a wrapped model. prompts: prompts as text.
        prepend_bos: put BOS first; by default if the tokenizer has one.
        require_demos: refuse prompts without demonstrations.

    Raises:
        PromptError: no demonstrations, an unknown word, or a tokenizer that is not this model's.
        ContextWindowError: a prompt is longer than the context window.
    """
    found = [
        tokenize_prompt(
            p, model.tokenizer, prepend_bos=prepend_bos, max_tokens=model.info.n_ctx, require_demos=require_demos
        )
        for p in prompts
    ]
    highest = max((max(t.ids) for t in found), default=0)
    if highest >= model.info.d_vocab:
        raise PromptError(
            f"the tokenizer gave token id {highest}, but {model.info.name} knows only {model.info.d_vocab} tokens: "
            "it is not this model's tokenizer."
        )
    return found


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
