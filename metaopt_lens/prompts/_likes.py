"""Everything a prompt can be given as: text, a dict as in the JSON prompt files, an `ICLPrompt`, or a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metaopt_lens._errors import FileFormatError, PromptError
from metaopt_lens.prompts._files import prompts_of
from metaopt_lens.prompts._prompt import ICLPrompt

PromptLike = str | ICLPrompt | Mapping[str, Any]

_FORMS = (
    "give an ICLPrompt, text such as 'apple : dax\\nhammer : wug\\npear :', a dict with the keys of the JSON prompt "
    "files (demos, query, ...), or a list of these"
)
_HINTS = {
    "Tensor": " Token ids have no demonstrations: model.to_string(tokens) gives their text.",
    "ActivationCache": " A cache is of one run, and several are needed: give the prompt that was run.",
}


def is_single(prompt: Any) -> bool:
    """Whether this is one prompt rather than a list (a dict with "queries" is a list).

    Args:
        prompt: a prompt, or a list of them, in any form.
    """
    return isinstance(prompt, str | ICLPrompt) or (isinstance(prompt, Mapping) and "queries" not in prompt)


def as_prompts(prompts: Any) -> list[ICLPrompt]:
    """The prompts in any of their forms; a single one is a list of one.

    Args:
        prompts: an `ICLPrompt`, text read by `ICLPrompt.from_string`, a dict with the keys of the JSON prompt files, or
            a list of these.

    Returns:
        All prompts, in order; a dict with "queries" gives one for each.

    Raises:
        PromptError: none, or something that is no prompt; names what came.
    """
    if isinstance(prompts, str | ICLPrompt | Mapping):
        return _read("the prompt", prompts)
    if not isinstance(prompts, list | tuple) and (
        type(prompts).__name__ in _HINTS or not isinstance(prompts, Iterable)
    ):
        raise _not_a_prompt("", prompts)
    found = [prompt for index, item in enumerate(prompts) for prompt in _read(f"prompt {index}", item)]
    if not found:
        raise PromptError("no prompts: give at least one.")
    return found


def as_prompt(prompt: Any) -> ICLPrompt:
    """One prompt in any of its forms; several raise `PromptError`.

    Args:
        prompt: see `as_prompts`.
    """
    found = as_prompts(prompt)
    if len(found) > 1:
        raise PromptError(f"one prompt is needed, got {len(found)}.")
    return found[0]


def _read(where: str, item: Any) -> list[ICLPrompt]:
    if isinstance(item, ICLPrompt):
        return [item]
    if isinstance(item, str):
        return [ICLPrompt.from_string(item)]
    if isinstance(item, Mapping):
        try:
            return prompts_of(where, dict(item))
        except FileFormatError as error:
            raise PromptError(str(error)) from None
    raise _not_a_prompt(f"{where}: ", item)


def _not_a_prompt(where: str, item: Any) -> PromptError:
    name = type(item).__name__
    return PromptError(f"{where}{name} is no prompt: {_FORMS}.{_HINTS.get(name, '')}")
