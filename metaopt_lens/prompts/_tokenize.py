"""Tokenising a prompt piece by piece, so that no merge crosses a border between S, D and Q."""

from __future__ import annotations

import re
from typing import Any, Protocol, runtime_checkable

from metaopt_lens._errors import ContextWindowError, OptionError, PromptError
from metaopt_lens._types import TokenSpan
from metaopt_lens.prompts._prompt import ICLPrompt, Piece
from metaopt_lens.prompts._template import Template
from metaopt_lens.prompts._tokenized import TokenizedPrompt

_SPACE_MARKS = ("▁", "Ġ")  # how SentencePiece and byte-level vocabularies write a space
_SENTINELS = ("\n", "|", ";", "!", "=", "~", "\t", "_", "§")
_BYTE = re.compile(r"<0x([0-7][0-9A-Fa-f])>")


@runtime_checkable
class HFTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer, fast or slow (and its `bos_token_id` and `unk_token_id`)."""

    def encode(self, text: Any, /, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, /, **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any, /) -> Any: ...


def tokenize_prompt(
    prompt: ICLPrompt,
    tokenizer: HFTokenizer | None,
    *,
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    require_demos: bool = False,
    allow_unk: bool = False,
) -> TokenizedPrompt:
    """Token ids of a prompt and the spans of its parts.

    BOS, the instruction with its separator, every demonstration's input, label and separator, and the query
    are tokenised one by one without special tokens, and their ids joined. A tokenizer that puts a space
    before every text (SentencePiece's dummy prefix) does so for the first of these texts only.

    Args:
        prompt: the prompt.
        tokenizer: a Hugging Face tokenizer, such as `model.tokenizer`.
        prepend_bos: None prepends BOS if the tokenizer has one; a model's own default is known to `tokenize_for`.
        max_tokens: the model's context window; a longer prompt raises `ContextWindowError`.
        require_demos: refuse a prompt without demonstrations.
        allow_unk: accept text for which the tokenizer has only its unknown token.
    """
    encoder = _PieceEncoder(tokenizer, allow_unk=allow_unk)
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, got {max_tokens}.")
    if require_demos and not prompt.demos:
        raise PromptError(
            "the prompt has no demonstrations but at least one is needed: without them there is no "
            "in-context learning to decompose. Give demos=[(input, label), ...]."
        )
    bos_ids = encoder.bos(prepend_bos)
    pieces = prompt.pieces()
    encoder.refuse_bos_in_text(pieces[0].text)

    ids = list(bos_ids)
    spans: dict[tuple[str, int | None], TokenSpan] = {}
    for number, piece in enumerate(pieces):
        piece_ids = encoder.encode(piece.text, first=number == 0)
        if not piece_ids and piece.kind != "separator":
            raise PromptError(f"the tokenizer gives no token for {_describe(piece)} {piece.text!r}: change it.")
        spans[piece.kind, piece.demo] = TokenSpan(len(ids), len(ids) + len(piece_ids))
        ids += piece_ids

    demos = tuple(TokenSpan(spans["input", i].start, spans["separator", i].stop) for i in range(len(prompt.demos)))
    query = spans["query", None]
    if max_tokens is not None and len(ids) > max_tokens:
        raise _too_long(len(ids), max_tokens, demos, query)
    prefix_stop = demos[0].start if demos else query.start
    zero_shot_ids = ids[:prefix_stop] + ids[query.start :]
    return TokenizedPrompt(
        ids=tuple(ids),
        tokens=tuple(encoder.readable(token) for token in ids),
        bos=TokenSpan(0, 1) if bos_ids else None,
        instruction=spans.get(("instruction", None)),
        demos=demos,
        demo_inputs=tuple(spans["input", i] for i in range(len(demos))),
        labels=tuple(spans["label", i] for i in range(len(demos))),
        query=query,
        matches_whole_string=ids == bos_ids + encoder.whole(prompt.text),
        zero_shot_matches_whole_string=zero_shot_ids == bos_ids + encoder.whole(prompt.zero_shot().text),
    )


def tokenize_label(
    label: str, template: Template, tokenizer: HFTokenizer | None, *, allow_unk: bool = False
) -> tuple[int, ...]:
    """Token ids of a label where it follows a query: what the model has to predict, with its space."""
    encoder = _PieceEncoder(tokenizer, allow_unk=allow_unk)
    label = label.strip()
    if not label:
        raise PromptError("the label is empty: give a word.")
    text = template.fill_label(label)
    ids = encoder.encode(text, first=False)
    if not ids:
        raise PromptError(f"the tokenizer gives no token for the label {text!r}: choose another label word.")
    return tuple(ids)


def read_token(token: int, tokenizer: HFTokenizer | None) -> str:
    """A token id as text, its leading space included (as in `TokenizedPrompt.tokens`)."""
    return _PieceEncoder(tokenizer, allow_unk=True).readable(token)


class _PieceEncoder:
    """Encodes stretches of a text without special tokens and without a dummy prefix inside the text."""

    def __init__(self, tokenizer: object, *, allow_unk: bool) -> None:
        if tokenizer is None:
            raise PromptError(
                "the tokenizer is missing: a prompt needs one to become token ids. Give the model's own, for "
                "example transformers.AutoTokenizer.from_pretrained(name), also to a model built from a "
                "configuration (its `tokenizer` argument)."
            )
        if not isinstance(tokenizer, HFTokenizer):
            raise PromptError(
                f"a Hugging Face tokenizer is needed (a transformers.PreTrainedTokenizerBase), got "
                f"{type(tokenizer).__name__}: wrap a tokenizers.Tokenizer as "
                f"transformers.PreTrainedTokenizerFast(tokenizer_object=...)."
            )
        self._tokenizer = tokenizer
        self._bos: int | None = getattr(tokenizer, "bos_token_id", None)
        self._unk: int | None = getattr(tokenizer, "unk_token_id", None)
        self._allow_unk = allow_unk
        self._known: dict[str, tuple[int, ...]] = {}  # pieces recur, and every piece is probed with the same letters

    def bos(self, prepend: bool | None) -> list[int]:
        """The ids that stand before the text: BOS, or none."""
        if prepend and self._bos is None:
            raise PromptError(
                "prepend_bos=True but the tokenizer has no BOS token: set tokenizer.bos_token, or give "
                "prepend_bos=False (or None: BOS where there is one)."
            )
        return [self._bos] if self._bos is not None and prepend is not False else []

    def refuse_bos_in_text(self, text: str) -> None:
        """BOS written out in the text would be counted to the first demonstration, or be there twice."""
        if self._bos is None:
            return
        word = str(self._tokenizer.convert_ids_to_tokens([self._bos])[0])
        if text.startswith(word):
            raise PromptError(
                f"the prompt's text begins with the BOS token {word!r}: remove it from the text, and say "
                f"with prepend_bos whether the ids begin with it."
            )

    def whole(self, text: str) -> list[int]:
        """Ids of a text on its own, as the tokenizer gives them."""
        if text not in self._known:
            ids = self._tokenizer.encode(text, add_special_tokens=False) if text else ()
            self._known[text] = tuple(int(i) for i in ids)
        return list(self._known[text])

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of a piece; `first` says whether it stands at the start of the text."""
        ids = self.whole(text) if first or not self._has_dummy_prefix(text) else self._behind_sentinel(text)
        if not self._allow_unk and self._unk is not None and self._unk in ids:
            unknown = next((word for word in text.split() if self._unk in self.whole(word)), text.strip())
            raise PromptError(
                f"the tokenizer does not know {unknown!r} (it becomes the unknown token "
                f"{self.readable(self._unk)!r}): use another word, or a model whose tokenizer knows it."
            )
        return ids

    def readable(self, token: int) -> str:
        """The token as text, its leading space included."""
        raw = str(self._tokenizer.convert_ids_to_tokens([token])[0])
        byte = _BYTE.fullmatch(raw)
        if byte is not None:
            return chr(int(byte[1], 16))
        if "▁" in raw or raw.startswith("<0x"):
            return raw.replace("▁", " ")
        text = str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return raw if not text or "\ufffd" in text else text

    def _starts_with_space(self, ids: list[int]) -> bool:
        return bool(ids) and str(self._tokenizer.convert_ids_to_tokens(ids[:1])[0]).startswith(_SPACE_MARKS)

    def _has_dummy_prefix(self, text: str) -> bool:
        probes = ("a", "0", ".", _probe(text))
        return any(self._starts_with_space(self.whole(probe)) for probe in probes)

    def _behind_sentinel(self, text: str) -> list[int]:
        for sentinel in _SENTINELS:
            ids, probe = self._cut(sentinel, text), self._cut(sentinel, _probe(text))
            if ids is not None and probe is not None and not self._starts_with_space(probe):
                return ids
        raise PromptError(
            f"the tokenizer puts a space before every text, and no way was found to tokenise {text!r} "
            f"without that space: use a tokenizer without dummy prefix (add_prefix_space=False, where it "
            "has that option)."
        )

    def _cut(self, sentinel: str, text: str) -> list[int] | None:
        """Ids of `text` behind `sentinel`, or None if the two do not stay apart."""
        head = self.whole(sentinel)
        both = self.whole(sentinel + text)
        apart = bool(head) and self._unk not in head and both[: len(head)] == head
        return both[len(head) :] if apart else None


def _probe(text: str) -> str:
    """The text without leading white space, or a letter where nothing that can be judged is left."""
    text = text.lstrip()
    return "a" if not text or text.startswith(_SPACE_MARKS) else text


def _describe(piece: Piece) -> str:
    return f"the {piece.kind}" if piece.demo is None else f"the {piece.kind} of demonstration {piece.demo}"


def _too_long(n_tokens: int, max_tokens: int, demos: tuple[TokenSpan, ...], query: TokenSpan) -> ContextWindowError:
    message = f"the prompt has {n_tokens} tokens but the context window holds {max_tokens}"
    if not demos or n_tokens - (demos[-1].stop - demos[0].start) > max_tokens:
        rest = n_tokens - (demos[-1].stop - demos[0].start if demos else 0)
        return ContextWindowError(
            f"{message}: even without demonstrations (0 would fit) it has {rest}. Shorten the query or "
            f"instruction, or use a model with a longer context window."
        )
    fit = sum(demo.stop + len(query) <= max_tokens for demo in demos)
    return ContextWindowError(
        f"{message}: the first {fit} of its {len(demos)} demonstrations would fit. Give fewer or shorter "
        f"ones, or use a model with a longer context window."
    )
