"""A random GPT-2-shaped model with a byte-level tokenizer, and sentences of our own in the fields of SST-2."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from families import bridge_of, make_hf
from transformers import AutoTokenizer, PreTrainedTokenizerFast

_GOOD = (
    "a warm and clever film",
    "the songs are lovely",
    "i laughed all evening",
    "a bright little story",
    "well acted",
)
_BAD = ("a dull and noisy film", "the songs are dreadful", "i yawned all evening", "a grey tired story", "badly acted")
_ENDS = ("from start to end", "in every scene", "as my sister said", "and that is that", "on the whole", "once again")


def rows() -> list[dict[str, Any]]:
    """30 sentences of each class, in the fields of SST-2, two thirds of them to train on."""
    found = []
    for number, end in enumerate(_ENDS):
        for label, starts in ((1, _GOOD), (0, _BAD)):
            for start in starts:
                split = "train" if number % 3 else "validation"
                found.append({"split": split, "text": f"{start} {end} ", "label": label})
    return found


def write_rows(file: Path, records: list[dict[str, Any]] | None = None) -> Path:
    """The rows as JSON Lines."""
    file.write_text("".join(json.dumps(r) + "\n" for r in (rows() if records is None else records)), encoding="utf-8")
    return file


@cache
def text_tokenizer() -> Any:
    """A small byte-level BPE tokenizer, trained on the sentences and prompts above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["Sentence: Label: Positive Negative\n" + str(r["text"]) for r in rows()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    folder = tempfile.mkdtemp(prefix="metaopt-lens-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_text_model(*, n_ctx: int = 256, n_layers: int = 2) -> Any:
    """A TransformerBridge of a random GPT-2 of the tokenizer's size."""
    tokenizer = text_tokenizer()
    hf = make_hf("gpt2", vocab_size=len(tokenizer), max_position_embeddings=n_ctx, num_hidden_layers=n_layers)
    return bridge_of(hf, tokenizer)
