"""An in-context prompt as text: demonstrations, a query, and the template that joins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from metaopt_lens._errors import PromptError
from metaopt_lens.prompts._from_string import read_string
from metaopt_lens.prompts._template import Template

if TYPE_CHECKING:
    from metaopt_lens.prompts._tokenized import TokenizedPrompt


@dataclass(frozen=True)
class Demo:
    """One demonstration: an input and the label that goes with it, without the template's text.

    Attributes:
        input: its text.
        label: its label; empty for a chunk of a context.
    """

    input: str
    label: str


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt that is tokenised on its own.

    Attributes:
        kind: what it is.
        text: its text.
        demo: the demonstration it belongs to, if any.
    """

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
        is_context = template.query is not None
        clean = tuple((_clean_chunk if is_context else _clean_demo)(i, demo) for i, demo in enumerate(demos))
        query = query.strip()
        if not query:
            raise PromptError("the query is empty: give the input whose label the model is to predict.")
        if instruction is not None:
            if not instruction.strip():
                raise PromptError("the instruction is empty: give its text, or None for no instruction.")
            instruction = instruction if is_context else instruction.strip()
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

        Blocks are split at blank lines if there are any, else at line ends. The last block is the query, taken as it
        stands (also where it ends in a label). In the others the label is what follows the last ":" or "->", or the
        last word where there is neither.

        Args:
            text: demonstrations and query.
            label: the query's right label, if known.
            candidates: label words to choose from; None for those of the demonstrations and the query.

        Returns:
            A prompt whose `text` equals the given text but for white space at its two ends and Windows line ends.

        Raises:
            PromptError: a text for which that cannot be.
        """
        found = read_string(text)
        template = Template(input="{input}", label=found.space + "{label}", separator=found.separator)
        return cls(found.demos, found.query, template, label=label, candidates=candidates)

    def pieces(self) -> tuple[Piece, ...]:
        """The stretches that are tokenised one by one, in order; their texts joined are `text`."""
        template = self.template
        pieces = []
        if self.instruction is not None:
            pieces.append(Piece("instruction", template.fill_instruction(self.instruction)))
        for i, demo in enumerate(self.demos):
            pieces += self._chunk(i, demo) if template.query is not None else self._demo(i, demo)
        pieces.append(Piece("query", template.fill_query(self.query)))
        return tuple(pieces)

    def _demo(self, i: int, demo: Demo) -> list[Piece]:
        template = self.template
        return [
            Piece("input", template.fill_input(demo.input), i),
            Piece("label", template.fill_label(demo.label), i),
            Piece("separator", template.separator, i),
        ]

    def _chunk(self, i: int, demo: Demo) -> list[Piece]:
        """A stretch of text; the white space behind it is its separator."""
        body = demo.input.rstrip()
        return [Piece("input", body, i), Piece("separator", demo.input[len(body) :], i)]

    def tokens(self, model: Any, *, prepend_bos: bool | None = None) -> TokenizedPrompt:
        """Token ids of the prompt as a model reads it, and the spans of its parts.

        Args:
            model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
            prepend_bos: put BOS first; None for the model's default (`TokenizedPrompt.bos_note` says which).

        Raises:
            PromptError: no tokenizer, or text that it does not know.
            ContextWindowError: the prompt is longer than the context window.
        """
        from metaopt_lens.models import wrap
        from metaopt_lens.prompts._for_model import tokenize_for

        return tokenize_for(wrap(model), self, prepend_bos=prepend_bos)

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
        """The same prompt with other demonstrations.

        Args:
            demos: `Demo` objects or (input, label) pairs.
        """
        return ICLPrompt(
            demos, self.query, self.template, self.instruction, label=self.label, candidates=self.candidates
        )

    def without_demo(self, index: int) -> ICLPrompt:
        """The same prompt without one demonstration.

        Args:
            index: the demonstration to leave out, counted from 0.

        Raises:
            PromptError: there is no such demonstration, or nothing of the context would be left.
        """
        if not 0 <= index < len(self.demos):
            raise PromptError(
                f"there is no demonstration {index} to leave out: the prompt has {len(self.demos)}, counted from 0."
            )
        if self.template.query is not None and len(self.demos) == 1:
            raise PromptError(
                "the context is a single chunk, and without it none is left: cut it finer (chunks='sentence', or a "
                "list of chunks), or compare with zero_shot()."
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


def _clean_chunk(index: int, demo: object) -> Demo:
    match demo:
        case Demo(str(text), "") | (str(text), "") if text.strip():
            return Demo(text if index else text.lstrip(), "")
    raise PromptError(
        f"chunk {index} of the context must be a text without label, not empty, got {demo!r}: build the prompt with "
        "ContextPrompt."
    )
