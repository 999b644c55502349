"""How an input, a label and a separator become text."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

from metaopt_lens._codec import NOT_IN_0_1
from metaopt_lens._errors import PromptError

_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Template:
    """The text around inputs and labels.

    Attributes:
        input: the text around an input, up to and including the colon.
        label: what is appended to it; the space before a label belongs to the label.
        separator: follows each demonstration and counts to it.
        instruction_separator: follows the instruction, where a prompt has one; None for the same as `separator`.
        query: the text around the query, where it stands behind a context (see `ContextPrompt`); None where the query
            has the form of an input. With it, demonstrations are stretches of text without labels, taken as they stand.
    """

    input: str = "{input}:"
    label: str = " {label}"
    separator: str = "\n"
    instruction_separator: str | None = None
    query: str | None = field(default=None, metadata=NOT_IN_0_1)

    def __post_init__(self) -> None:
        _check_placeholder("input", self.input)
        _check_placeholder("label", self.label)
        if self.query is not None:
            _check_placeholder("query", self.query)
        if self.input != self.input.rstrip():
            raise PromptError(
                f"the template's input {self.input!r} ends with white space: the space before a label "
                f"belongs to the label, so remove it there and write label={' {label}'!r}."
            )

    def to_dict(self) -> dict[str, str | None]:
        """The fields as JSON-able data, with `query` only where there is one: as 0.1 wrote them."""
        fields = dataclasses.asdict(self)
        return {name: text for name, text in fields.items() if name != "query" or text is not None}

    def fill_input(self, text: str) -> str:
        """The template's input part around `text`, which may itself contain braces.

        Args:
            text: the input.
        """
        return self.input.replace("{input}", text)

    def fill_query(self, text: str) -> str:
        """The template's text around the query.

        Args:
            text: the query.
        """
        return self.fill_input(text) if self.query is None else self.query.replace("{query}", text)

    def fill_label(self, text: str) -> str:
        """The template's label part around `text`, with the space that belongs to the label.

        Args:
            text: the label word.
        """
        return self.label.replace("{label}", text)

    def fill_instruction(self, text: str) -> str:
        """An instruction and the separator that follows it.

        Args:
            text: the instruction.
        """
        separator = self.separator if self.instruction_separator is None else self.instruction_separator
        return text + separator


def _check_placeholder(name: str, text: str) -> None:
    wanted = "{" + name + "}"
    found = _PLACEHOLDER.findall(text)
    if found == [wanted]:
        return
    if wanted not in found:
        problem = f"has no {wanted}"
    elif found.count(wanted) > 1:
        problem = f"has {wanted} more than once"
    else:
        others = ", ".join(part for part in found if part != wanted)
        problem = f"has a placeholder that nothing fills: {others}"
    raise PromptError(f"the template's {name} {text!r} {problem}: it needs {wanted} once and no other {{...}}.")
