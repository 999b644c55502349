"""Reading a whole prompt from one string: blocks, separators, and which word of a block is its label."""

from __future__ import annotations

import re
from dataclasses import dataclass

from metaopt_lens._errors import PromptError

_BLANK_LINES = re.compile(r"\s*\n[^\S\n]*\n\s*")
_LINE_END = re.compile(r"\s*\n\s*")
_LAST_MARK = re.compile(r".*(?::|->)", re.DOTALL)
_LAST_WORD = re.compile(r"(.*\S)(\s+)(\S+)", re.DOTALL)


@dataclass(frozen=True)
class ReadString:
    """What `read_string` finds.

    Attributes:
        demos: text before the label, and label, of every block but the last.
        query: the last block.
        space: the white space before every label.
        separator: what stands behind every block.
    """

    demos: tuple[tuple[str, str], ...]
    query: str
    space: str
    separator: str


def read_string(text: str) -> ReadString:
    """Cut a prompt into its parts; see `ICLPrompt.from_string`.

    Args:
        text: the whole prompt.

    Raises:
        PromptError: no demonstration, a block without label, or white space that differs between blocks.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    border = _BLANK_LINES if _BLANK_LINES.search(text) else _LINE_END
    blocks = border.split(text)
    separators = border.findall(text)
    kind = "a blank line" if border is _BLANK_LINES else "a line end"
    if not text:
        raise PromptError(r"the prompt is empty: write it as in 'apple : dax\nhammer : wug\npear :'.")
    if not separators:
        raise PromptError(
            f"the prompt has no demonstration: it is the single block {_short(text)}. Write the "
            f"demonstrations before the query, each followed by a line end or a blank line."
        )
    for number, separator in enumerate(separators[1:], start=2):
        if separator != separators[0]:
            raise PromptError(
                f"block {number} ({_short(blocks[number - 1])}) is followed by {separator!r} but block "
                f"1 by {separators[0]!r}: put the same separator ({kind}) after every block, with the "
                f"same spaces around it."
            )
    parts = [_split_block(number, block) for number, block in enumerate(blocks[:-1], start=1)]
    prefix = parts[0][1]
    for number, (_, other, _) in enumerate(parts, start=1):
        if other != prefix:
            raise PromptError(
                f"block {number} ({_short(blocks[number - 1])}) has {other!r} before its label but "
                f"block 1 has {prefix!r}: write the same white space before every label, or build the "
                f"prompt from Demo objects if the label was not meant to begin there."
            )
    return ReadString(
        demos=tuple((before, word) for before, _, word in parts),
        query=blocks[-1],
        space=prefix,
        separator=separators[0],
    )


def _split_block(number: int, block: str) -> tuple[str, str, str]:
    """Text before the label, white space before the label, label."""
    mark = _LAST_MARK.match(block)
    if mark is not None:
        before, rest = mark[0], block[mark.end() :]
        word = rest.lstrip()
        if not word:
            sign = "->" if before.endswith("->") else ":"
            raise PromptError(
                f"block {number} ({_short(block)}) has no label after its last {sign!r}: only the last "
                f"block, the query, may end there. Write the label behind it."
            )
        return before, rest[: len(rest) - len(word)], word
    words = _LAST_WORD.fullmatch(block)
    if words is None:
        raise PromptError(
            f"block {number} ({_short(block)}) is a single word, so it has no label: "
            f"write a demonstration as 'input : label'."
        )
    return words[1], words[2], words[3]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
