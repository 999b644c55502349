"""Corpora: every batch is a function of seed and step alone, so that a resumed run sees the same ones."""

from __future__ import annotations

import hashlib
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import FileFormatError, PromptError
from metaopt_lens.models.tiny._load import DATA
from metaopt_lens.models.tiny._sampling import sample_stream
from metaopt_lens.models.tiny._vocabulary import BOS, ID_OF, WORDS
from metaopt_lens.training._documents import load_documents
from metaopt_lens.training._training_config import TrainingConfig
from metaopt_lens.training._training_settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_BOS = 256


@dataclass(frozen=True)
class Batch:
    """Sequences to learn from; ``weights[:, t]`` is that of the loss on predicting ``tokens[:, t + 1]``."""

    tokens: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch target"]


class Corpus(ABC):
    """Tokens to train and to validate on."""

    n_vocab: int
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: str
    """SHA-256 of the tokens, or of what makes them."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> Batch:
        """The training batch of a step.

        Args:
            seed: the run's seed.
            step: counted from 0.
        """

    @abstractmethod
    def windows(self, length: int, n_tokens: int) -> Batch:
        """Validation sequences of `length` tokens, about `n_tokens` in all; the same ones every time.

        Weights are 1, or 0 for tokens that nothing could predict and no training asked for.

        Args:
            length: tokens in each sequence.
            n_tokens: about how many tokens in all.
        """


def load_corpus(config: TrainingConfig) -> Corpus:
    """The corpus of a configuration.

    Args:
        config: names the source, the context length and the batch size.

    Raises:
        FileFormatError: a text that is missing or cannot be read.
        PromptError: a text shorter than one context.
    """
    d, n_ctx, batch = config.data, config.model.n_ctx, config.optimizer.batch
    if d.source == "synthetic":
        return SyntheticCorpus(d, batch=batch, steps=config.optimizer.steps)
    return TextCorpus(load_documents(d), d, tokenizer=corpus_tokenizer(d), n_ctx=n_ctx, batch=batch)


def corpus_tokenizer(data: DataSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a corpus; None for bytes.

    Raises:
        FileFormatError: it cannot be loaded.
    """
    if data.source == "synthetic":
        return word_tokenizer()
    return None if data.tokenizer is None else _tokenizer(data.tokenizer)


def word_tokenizer() -> PreTrainedTokenizerBase:
    """The bundled model's, read from its folder: a bridge takes no other kind."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(DATA), local_files_only=True)


class SyntheticCorpus(Corpus):
    """The bundled model's in-context tasks: every sequence draws its own binding of labels to categories.

    Learned is what the sequence determines, labels whose category occurred before, and the rest of the text with a
    tenth of the weight. A first label cannot be known and has none.
    """

    def __init__(self, data: DataSettings, *, batch: int, steps: int) -> None:
        self._data, self._batch, self._steps = data, batch, steps
        self.n_vocab = len(WORDS)
        self.tokenizer = corpus_tokenizer(data)
        self.fingerprint = hashlib.sha256(repr((WORDS, data.n_items, data.n_categories)).encode()).hexdigest()

    def _row(self, rng: random.Random, n_items: int, n_nouns: int) -> tuple[list[int], list[float]]:
        low, high = self._data.n_categories
        stream = sample_stream(rng, n_items=n_items, n_categories=rng.randint(low, high), n_nouns=n_nouns)
        ids, weights, seen = [BOS], list[float](), set[str]()
        for noun, label in stream:
            ids += [ID_OF[noun], ID_OF[":"], ID_OF[label], ID_OF["\n"]]
            weights += [0.1, 0.1, 1.0 if label in seen else 0.0, 0.1]
            seen.add(label)
        return ids, weights

    def batch(self, seed: int, step: int) -> Batch:
        rng = random.Random(f"train {seed} {step}")
        start, stop = self._data.curriculum
        progress = (step / self._steps - start) / max(stop - start, 1e-9)
        n_nouns = 1 + round(11 * min(max(progress, 0.0), 1.0))
        n_items = rng.randint(*self._data.n_items)
        rows = [self._row(rng, n_items, n_nouns) for _ in range(self._batch)]
        return Batch(torch.tensor([ids for ids, _ in rows]), torch.tensor([w for _, w in rows]))

    def windows(self, length: int, n_tokens: int) -> Batch:
        rng = random.Random("validation")
        n_items = -(-(length - 1) // 4)
        rows = [self._row(rng, n_items, 12) for _ in range(max(1, n_tokens // length))]
        weights = torch.tensor([w[: length - 1] for _, w in rows])
        return Batch(torch.tensor([ids[:length] for ids, _ in rows]), (weights > 0).float())


class TextCorpus(Corpus):
    """Documents, some kept for validation, joined with a separator token; training windows begin anywhere."""

    def __init__(
        self,
        documents: Sequence[tuple[str, str]],
        data: DataSettings,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        n_ctx: int,
        batch: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.n_vocab = _BYTE_BOS + 1 if tokenizer is None else len(tokenizer)
        self._n_ctx, self._batch = n_ctx, batch
        kept, held = list[list[int]](), list[list[int]]()
        for name, text in documents:
            # By the name's checksum, so that a document is always on the same side.
            is_held = zlib.crc32(name.encode()) % 10_000 < 10_000 * data.validation
            (held if is_held else kept).append(self._encode(text))
        self._train, self._validation = _flat(kept), _flat(held)
        for what, tokens in (("training", self._train), ("validation", self._validation)):
            if len(tokens) < n_ctx + 1:
                raise PromptError(
                    f"the {what} part of the corpus has {len(tokens)} tokens, but one context needs {n_ctx + 1}: give "
                    "more text, or a smaller model.n_ctx."
                )
        raw = torch.cat([self._train, self._validation]).numpy().tobytes()
        self.fingerprint = hashlib.sha256(raw).hexdigest()

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return [_BYTE_BOS, *text.encode()]
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        separator = self.tokenizer.bos_token_id if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id
        return [*([] if separator is None else [separator]), *ids]

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, seed: int, step: int) -> Batch:
        rng = random.Random(f"train {seed} {step}")
        starts = [rng.randrange(len(self._train) - self._n_ctx + 1) for _ in range(self._batch)]
        tokens = torch.stack([self._train[at : at + self._n_ctx] for at in starts]).long()
        return Batch(tokens, torch.ones(self._batch, self._n_ctx - 1))

    def windows(self, length: int, n_tokens: int) -> Batch:
        # Stretches of one context each, spread over the validation text and cut into windows: every length is measured
        # on the same text.
        n = max(1, min(n_tokens, len(self._validation)) // self._n_ctx)
        room = len(self._validation) - self._n_ctx
        starts = [room * i // max(n - 1, 1) for i in range(n)]
        stretches = torch.stack([self._validation[at : at + self._n_ctx] for at in starts]).long()
        tokens = stretches[:, : self._n_ctx // length * length].reshape(-1, length)
        return Batch(tokens, torch.ones(len(tokens), length - 1))


def _flat(documents: Sequence[Sequence[int]]) -> Int[Tensor, " token"]:
    return torch.tensor([token for document in documents for token in document], dtype=torch.int32)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"the tokenizer {name!r} cannot be loaded ({error}).") from None
