"""A query behind any context: its sentences or paragraphs play the part of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.prompts._chunks import split_chunks
from metaopt_lens.prompts._prompt import Demo, ICLPrompt
from metaopt_lens.prompts._template import Template

_ROLES = ("user", "system")
_BETWEEN = "\n\n"
# Stand in for the texts while a chat template is filled in.
_CONTEXT, _QUERY = "\ue000context\ue000", "\ue000query\ue000"


class ContextPrompt(ICLPrompt):
    """A query behind a context whose chunks play the part of demonstrations: which sentence wrote this word?

    Every function that takes an `ICLPrompt` takes it: a chunk is a demonstration without label. Joined, the chunks are
    the context: line ends belong to the chunk before them, a space between sentences to the chunk behind it.

    Args:
        context: a text, which `chunks` says how to cut, or a list of chunks. Listed chunks are joined with a line end
            where they have no white space of their own.
        query: what is asked behind the context, as the model reads it, such as ``"Question: ...\\nAnswer:"``.
        chunks: ``"sentence"``, ``"line"`` or ``"paragraph"``.
        instruction: text before the context, which the zero-shot prompt has too; in a chat the system message.
        label: the right answer, if known, of any number of tokens.
        candidates: the answers to choose from, if known.
        chat: a tokenizer whose chat template is to be put around the texts, such as ``model.tokenizer``; None for the
            plain text.
        role: who says the context in a chat: the ``"user"`` before the query, or the ``"system"``.

    Raises:
        PromptError: an empty text, a tokenizer without chat template, or a chat template that does not show the
            context and the query as they are.
        OptionError: an unknown kind of chunk or role.
    """

    def __init__(
        self,
        context: str | Sequence[str],
        query: str,
        *,
        chunks: str = "sentence",
        instruction: str | None = None,
        label: str | None = None,
        candidates: Sequence[str] | None = None,
        chat: Any = None,
        role: str = "user",
    ) -> None:
        if role not in _ROLES:
            raise OptionError(f"role must be 'user' or 'system', got {role!r}.")
        texts = list(split_chunks(context.strip(), chunks) if isinstance(context, str) else _listed(context))
        if chat is None:
            before, between = None if instruction is None else instruction.strip(), _BETWEEN
            template = Template("{input}", separator="", instruction_separator=_BETWEEN, query="{query}")
        else:
            before, between, around = _in_chat(chat, instruction, role)
            template = Template("{input}", "{label}", separator="", instruction_separator="", query=around)
        texts[-1] += between if texts[-1] == texts[-1].rstrip() else ""
        super().__init__(
            [Demo(text, "") for text in texts], query, template, before, label=label, candidates=candidates
        )


def _listed(chunks: Sequence[str]) -> list[str]:
    texts = list(chunks)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"chunk {index} of the context must be a text and not empty, got {text!r}.")
    if not texts:
        raise PromptError("the context is empty: give at least one chunk.")
    for index, (text, following) in enumerate(pairwise(texts)):
        if text == text.rstrip() and following == following.lstrip():
            texts[index] += "\n"
    return texts


def _in_chat(tokenizer: Any, instruction: str | None, role: str) -> tuple[str | None, str, str]:
    """What a chat template puts before the context, between context and query, and around the query."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError(
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} has no chat template: leave chat "
            "out, or give the tokenizer of a model that was trained on chats."
        )
    if role == "user":
        messages = [] if instruction is None else [{"role": "system", "content": instruction.strip()}]
        messages.append({"role": "user", "content": _CONTEXT + _BETWEEN + _QUERY})
    else:
        told = _CONTEXT if instruction is None else instruction.strip() + _BETWEEN + _CONTEXT
        messages = [{"role": "system", "content": told}, {"role": "user", "content": _QUERY}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like, such as for a system message
        raise PromptError(f"the chat template refuses these messages ({error}): try another role.") from error
    if text.count(_CONTEXT) != 1 or text.count(_QUERY) != 1 or text.index(_CONTEXT) > text.index(_QUERY):
        raise PromptError(
            "the chat template does not show the context and then the query, once each: build the text yourself, "
            "without chat."
        )
    before, rest = text.split(_CONTEXT)
    between, after = rest.split(_QUERY)
    if role == "user":
        return before or None, between, "{query}" + after
    return before or None, "", between + "{query}" + after
