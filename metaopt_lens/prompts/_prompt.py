"""An in-context prompt as text: demonstrations, a query, and the template that joins them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metaopt_lens._errors import PromptError
from metaopt_lens.prompts._template import Template

_BLANK_LINES = re.compile(r"\s*\n[^\S\n]*\n\s*")
_LINE_END = re.compile(r"\s*\n\s*")
_LAST_MARK = re.compile(r".*(?::|->)", re.DOTALL)
_LAST_WORD = re.compile(r"(.*\S)(\s+)(\S+)", re.DOTALL)


@dataclass(frozen=True)
class Demo:
    """One demonstration: an input and the label that goes with it, without the template's text."""

    input: str
    label: str


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt that is tokenised on its own; `demo` is the demonstration it belongs to."""

    kind: Literal["instruction", "input", "label", "separator", "query"]
    text: str
    demo: int | None = None


@dataclass(frozen=True, init=False)
class ICLPrompt:
    """Demonstrations followed by a query, in the form the template gives them.

    White space at both ends of inputs, labels, query, instruction and candidates is removed: the template
    says what stands between them. White space inside them is kept.

    Args:
        demos: `Demo` objects or (input, label) pairs, in the order the model reads them; may be empty.
        query: the input whose label the model is to predict.
        template: the text around inputs and labels.
        instruction: text that stands before the demonstrations, and before the query in the zero-shot prompt.
        label: the query's correct label, if known.
        candidates: the label words to choose from, if known.
    """

    demos: tuple[Demo, ...]
    query: str
    template: Template
    instruction: str | None
    label: str | None
    candidates: tuple[str, ...] | None

    def __init__(
        self,
        demos: Sequence[Demo | tuple[str, str]],
        query: str,
        template: Template = Template(),  # noqa: B008 (frozen)
        instruction: str | None = None,
        *,
        label: str | None = None,
        candidates: Sequence[str] | None = None,
    ) -> None:
        clean = tuple(_clean_demo(i, demo) for i, demo in enumerate(demos))
        query = query.strip()
        if not query:
            raise PromptError("the query is empty: give the input whose label the model is to predict.")
        if instruction is not None:
            instruction = instruction.strip()
            if not instruction:
                raise PromptError("the instruction is empty: give its text, or None for no instruction.")
        if label is not None:
            label = label.strip()
            if not label:
                raise PromptError("the query's label is empty: give a word, or None if it is not known.")
        words = None if candidates is None else _clean_candidates(candidates)
        if label is not None and words is not None and label not in words:
            raise PromptError(
                f"the query's label {label!r} is not among the candidates ({', '.join(words)}): "
                f"add it to them, or correct it."
            )
        object.__setattr__(self, "demos", clean)
        object.__setattr__(self, "query", query)
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "instruction", instruction)
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "candidates", words)

    @classmethod
    def from_string(cls, text: str, *, label: str | None = None, candidates: Sequence[str] | None = None) -> ICLPrompt:
        r"""Read a whole prompt, such as ``"apple : dax\nhammer : wug\npear :"``.

        Blocks are split at blank lines if there are any, else at line ends. The last block is the query,
        taken as it stands (also where it ends in a label). In the others the label is what follows the last
        ":" or "->", or the last word where there is neither. The result's `text` equals the given text but
        for white space at its two ends and Windows line ends; a text for which that cannot be is refused with
        `PromptError`.
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
        template = Template(input="{input}", label=prefix + "{label}", separator=separators[0])
        demos = [Demo(before, word) for before, _, word in parts]
        return cls(demos, blocks[-1], template, label=label, candidates=candidates)

    def pieces(self) -> tuple[Piece, ...]:
        """The stretches that are tokenised one by one, in order; their texts joined are `text`."""
        template = self.template
        pieces = []
        if self.instruction is not None:
            pieces.append(Piece("instruction", template.fill_instruction(self.instruction)))
        for i, demo in enumerate(self.demos):
            pieces.append(Piece("input", template.fill_input(demo.input), i))
            pieces.append(Piece("label", template.fill_label(demo.label), i))
            pieces.append(Piece("separator", template.separator, i))
        pieces.append(Piece("query", template.fill_input(self.query)))
        return tuple(pieces)

    @property
    def text(self) -> str:
        """The whole prompt as the model reads it (without BOS)."""
        return "".join(piece.text for piece in self.pieces())

    def zero_shot(self) -> ICLPrompt:
        """The same prompt without demonstrations.

        To run a zero-shot prompt against an in-context one, use `TokenizedPrompt.zero_shot`, which keeps ids.
        """
        return self.with_demos(())

    def with_demos(self, demos: Sequence[Demo | tuple[str, str]]) -> ICLPrompt:
        """The same prompt with other demonstrations."""
        return ICLPrompt(
            demos,
            self.query,
            self.template,
            self.instruction,
            label=self.label,
            candidates=self.candidates,
        )

    def without_demo(self, index: int) -> ICLPrompt:
        """The same prompt without demonstration `index` (from 0)."""
        if not 0 <= index < len(self.demos):
            raise PromptError(
                f"there is no demonstration {index} to leave out: the prompt has {len(self.demos)}, counted from 0."
            )
        return self.with_demos(self.demos[:index] + self.demos[index + 1 :])


def _clean_demo(index: int, demo: object) -> Demo:
    fields: tuple[object, ...]
    match demo:
        case Demo():
            fields = (demo.input, demo.label)
        case (_, _):
            fields = tuple(demo)
        case _:
            fields = ()
    texts = [text for text in fields if isinstance(text, str)]
    if len(texts) != 2:
        raise PromptError(f"demonstration {index} must be a Demo or an (input, label) pair of strings, got {demo!r}.")
    for name, text in zip(("input", "label"), texts, strict=True):
        if not text.strip():
            raise PromptError(f"the {name} of demonstration {index} is empty: give its text, or leave it out.")
    return Demo(texts[0].strip(), texts[1].strip())


def _clean_candidates(candidates: Sequence[str]) -> tuple[str, ...]:
    if isinstance(candidates, str):
        raise PromptError(f"candidates must be a list of words, got the string {candidates!r}.")
    words = tuple(word.strip() for word in candidates)
    if not words or not all(words):
        raise PromptError(f"candidates need at least one word and no empty one, got {list(words)}.")
    doubled = sorted({word for word in words if words.count(word) > 1})
    if doubled:
        raise PromptError(f"candidates are named more than once ({', '.join(doubled)}): name each word once.")
    return words


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
