"""The words of the bundled model: nouns in categories, arbitrary label words, marks; and its tokenizer."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNK, BOS, EOS = range(4)

MARKS = ("\n", ":", "->", ".", ",", "?")

# Every noun is one lowercase word and stands in one category only (no "orange", no "chicken").
CATEGORIES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "fruit": "apple pear plum cherry grape peach mango banana lemon melon fig apricot",
        "tool": "hammer saw wrench drill chisel pliers screwdriver axe shovel rake file clamp",
        "mammal": "dog cat horse cow sheep goat lion tiger wolf bear rabbit deer",
        "bird": "eagle sparrow crow owl parrot penguin duck goose swan hawk robin pigeon",
        "vehicle": "car bus truck train bicycle boat ship tram van taxi tractor airplane",
        "clothing": "shirt coat hat sock glove scarf dress skirt jacket shoe belt sweater",
        "furniture": "chair table sofa desk bed shelf wardrobe stool bench cabinet dresser bookcase",
        "instrument": "piano violin guitar flute drum trumpet cello harp clarinet oboe banjo tuba",
        "body": "hand foot arm leg nose ear eye mouth knee elbow shoulder finger",
        "profession": "doctor teacher nurse lawyer farmer baker pilot judge sailor tailor butcher painter",
        "building": "house church school hospital castle barn tower temple hotel museum library factory",
        "color": "red blue green yellow purple brown black white gray pink scarlet beige",
        "drink": "water milk tea coffee juice wine beer soda cider lemonade cocoa whiskey",
        "metal": "iron gold silver copper tin lead zinc nickel steel bronze brass aluminum",
        "vegetable": "carrot potato onion cabbage spinach pea bean celery lettuce turnip beet radish",
        "weather": "rain snow wind storm fog hail thunder frost sleet drizzle blizzard breeze",
    }.items()
}

_LABELS = """
dax wug blicket toma fep zav kiki bouba gorp lorp mib nale pim rog sep tiv
vek wim yob zug blap crell drin flum glick jop kralt plonk quib snarf trell zorp
"""
LABELS: tuple[str, ...] = tuple(_LABELS.split())

CATEGORY_OF: dict[str, str] = {noun: name for name, nouns in CATEGORIES.items() for noun in nouns}

WORDS: tuple[str, ...] = (*SPECIALS, *MARKS, *LABELS, *chain.from_iterable(CATEGORIES.values()))
ID_OF: dict[str, int] = {word: i for i, word in enumerate(WORDS)}


def _held_out() -> frozenset[tuple[str, str]]:
    # A diagonal pattern: every category loses a fifth of the labels, every label a fifth of the categories.
    return frozenset(
        (name, label) for c, name in enumerate(CATEGORIES) for i, label in enumerate(LABELS) if (3 * c + i) % 5 == 0
    )


HELD_OUT_PAIRS: frozenset[tuple[str, str]] = _held_out()
"""The (category, label) pairs that never occur in training; test prompts use only these."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: blanks separate words and are dropped, every newline is a token of its own.

    It adds no special tokens by itself, and text cut at blanks or newlines gives the same ids as whole.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(ID_OF), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"\n|->|[:.,?]"), behavior="isolated"),
        ]
    )
    # Tokens are joined with blanks; those that a newline brought along are taken away again.
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" *\n *"), "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=CONTEXT_WINDOW,
        model_input_names=["input_ids", "attention_mask"],
    )


CONTEXT_WINDOW = 512
"""Longest sequence the model accepts; but training went up to 97 tokens (24 items) and accuracy falls beyond."""
