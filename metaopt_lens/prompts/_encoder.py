"""Encoding stretches of a text, so that joined they are the ids of the whole."""

from __future__ import annotations

import re
from typing import Any, Protocol, runtime_checkable

from metaopt_lens._errors import PromptError
from metaopt_lens.prompts._prompt import Piece

_SPACE_MARKS = ("▁", "Ġ")  # how SentencePiece and byte-level vocabularies write a space
_SENTINELS = ("\n", "|", ";", "!", "=", "~", "\t", "_", "§")
_BYTE = re.compile(r"<0x([0-7][0-9A-Fa-f])>")


@runtime_checkable
class HFTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer, fast or slow (and its `bos_token_id` and `unk_token_id`)."""

    def encode(self, text: Any, /, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, /, **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any, /) -> Any: ...


class PieceEncoder:
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
        self.tokenizer = tokenizer
        self._bos: int | None = getattr(tokenizer, "bos_token_id", None)
        self._unk: int | None = getattr(tokenizer, "unk_token_id", None)
        self._allow_unk = allow_unk
        # Pieces and tokens recur, and every piece is probed with the same letters.
        self._known: dict[str, tuple[int, ...]] = {}
        self._read: dict[int, str] = {}

    def bos(self, prepend: bool | None) -> list[int]:
        """The ids that stand before the text: BOS, or none."""
        if prepend and self._bos is None:
            raise PromptError(
                "prepend_bos=True but the tokenizer has no BOS token: set tokenizer.bos_token, or give "
                "prepend_bos=False (or None: BOS where there is one)."
            )
        return [self._bos] if self._bos is not None and prepend is not False else []

    def without_bos(self, piece: Piece) -> str:
        """The text of the first piece without a BOS that it writes out, which would then be there twice.

        In an instruction BOS may be written, as chat templates do; in a demonstration it would be counted to it.
        """
        if self._bos is None:
            return piece.text
        word = str(self.tokenizer.convert_ids_to_tokens([self._bos])[0])
        if piece.text.startswith(word) and piece.kind != "instruction":
            raise PromptError(
                f"the prompt's text begins with the BOS token {word!r}: remove it from the text, and say "
                f"with prepend_bos whether the ids begin with it."
            )
        return piece.text.removeprefix(word)

    def whole(self, text: str) -> list[int]:
        """Ids of a text on its own, as the tokenizer gives them."""
        if text not in self._known:
            ids = self.tokenizer.encode(text, add_special_tokens=False) if text else ()
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
        if token not in self._read:
            self._read[token] = self._decoded(token)
        return self._read[token]

    def _decoded(self, token: int) -> str:
        raw = str(self.tokenizer.convert_ids_to_tokens([token])[0])
        byte = _BYTE.fullmatch(raw)
        if byte is not None:
            return chr(int(byte[1], 16))
        if "▁" in raw or raw.startswith("<0x"):
            return raw.replace("▁", " ")
        text = str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return raw if not text or "\ufffd" in text else text

    def _starts_with_space(self, ids: list[int]) -> bool:
        return bool(ids) and str(self.tokenizer.convert_ids_to_tokens(ids[:1])[0]).startswith(_SPACE_MARKS)

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
