"""Laws of tokenised prompts, on small real tokenizers built on the spot."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from metaopt_lens._errors import ContextWindowError, OptionError, PromptError, SpanError
from metaopt_lens._types import TokenSpan
from metaopt_lens.prompts import Demo, ICLPrompt, Template, TokenizedPrompt, tokenize_label, tokenize_prompt

_TEXT = [
    "apple : dax\nhammer : wug\npear : dax\n\nsaw : wug",
    "Sentence: a fine film\nLabel: Positive\n\nSentence: a dull plot\nLabel: Negative",
    "Sort the words . {braces} 0123456789 é ü 漢字 -> ; | ! = ~",
]
_METASPACE = ("metaspace-first", "metaspace-always", "prepend")
_NAMES = ("byte-level", "byte-level-prefix-space", "byte-level-no-bos", *_METASPACE, "unigram-collapsing")


def _sentencepiece_bpe(kind: str) -> Tokenizer:
    """Llama-like: spaces as "▁", a dummy prefix, bytes for the rest."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzSLPN:.,;|!"]
    merges = [(f"▁{'dax'[:i]}" if i else "▁", "dax"[i]) for i in range(3)]
    merges += [("a", "p"), ("p", "l"), ("▁", "ap"), ("▁ap", "pl"), ("▁", ":"), ("▁", "▁")]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for word in [*words, *(a + b for a, b in merges)]:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # type: ignore[list-item]
        )
    else:
        scheme = kind.removeprefix("metaspace-")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[arg-type]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _byte_level(prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _unigram() -> Tokenizer:
    """T5-like: all white space is a space, a dummy prefix before every text."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁dax", -3.0), ("▁apple", -3.0)]
    pieces += [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyzSLPN:.,;|!=~0123456789->é{}"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def _word_level() -> Tokenizer:
    words = ["<unk>", "<s>", "apple", "hammer", "pear", "dax", "wug", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@functools.cache
def make(name: str) -> PreTrainedTokenizerFast:
    if name.startswith("byte-level"):
        end = {} if name.endswith("no-bos") else {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        return PreTrainedTokenizerFast(tokenizer_object=_byte_level(name.endswith("prefix-space")), **end)
    if name == "word-level":
        return PreTrainedTokenizerFast(tokenizer_object=_word_level(), unk_token="<unk>", bos_token="<s>")
    if name == "unigram-collapsing":
        return PreTrainedTokenizerFast(tokenizer_object=_unigram(), unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece_bpe(name), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


PROMPT = ICLPrompt([("apple", "dax"), ("hammer", "wug")], "pear", Template("{input} :"))

word = st.text(st.sampled_from("abdeplx:.1 {}é"), min_size=1, max_size=8).filter(lambda s: s.strip())
# arguments, not prompts: beartype's random checks must not run inside a strategy
prompts = st.tuples(
    st.lists(st.tuples(word, word), max_size=4).map(tuple),
    word,
    st.sampled_from(
        [
            Template(),
            Template("Sentence: {input}\nLabel:", separator="\n\n"),
            Template("{input}", "->{label}", " ; ", "\n"),
            Template("{input} :", " {label}", ""),
        ]
    ),
    st.none() | word,
)


def _pieces_of(result: TokenizedPrompt) -> list[tuple[int, ...]]:
    """Ids of every non-empty piece, read off the spans."""
    found = [result.ids[result.instruction.slice]] if result.instruction else []
    for demo, text, label in zip(result.demos, result.demo_inputs, result.labels, strict=True):
        found += [result.ids[text.slice], result.ids[label.slice], result.ids[label.stop : demo.stop]]
    return [*found, result.ids[result.query.slice]]


@pytest.mark.parametrize("name", _NAMES)
@settings(max_examples=40, deadline=None)
@given(args=prompts, data=st.data())
def test_spans_are_a_partition_and_zero_shot_keeps_ids(name: str, args: tuple[Any, ...], data: st.DataObject) -> None:
    prompt = ICLPrompt(*args)
    tokenizer = make(name)
    prepend = data.draw(st.sampled_from([None, False] + [True] * (tokenizer.bos_token_id is not None)))
    result = tokenize_prompt(prompt, tokenizer, prepend_bos=prepend, allow_unk=True)
    prefix, demos, query = result.prefix, result.demonstrations, result.query
    positions = [*range(result.n_tokens)]
    assert positions[prefix.slice] + positions[demos.slice] + positions[query.slice] == positions
    assert [p for span in result.demos for p in positions[span.slice]] == positions[demos.slice]
    assert len(result.demos) == len(prompt.demos)
    with_bos = tokenizer.bos_token_id is not None and prepend is not False
    assert (result.bos is not None) == with_bos
    assert result.ids[:with_bos] == (tokenizer.bos_token_id,) * with_bos

    zero = result.zero_shot()
    assert zero.ids == result.ids[prefix.slice] + result.ids[query.slice]
    assert zero.ids[zero.prefix.slice] == result.ids[prefix.slice]
    assert zero.ids[zero.query.slice] == result.ids[query.slice]
    assert zero.demos == ()
    assert zero.demonstrations == TokenSpan(prefix.stop, prefix.stop)
    assert zero.zero_shot() == zero
    whole = tokenizer.encode(prompt.zero_shot().text, add_special_tokens=False)
    assert zero.matches_whole_string == (list(zero.ids[with_bos:]) == whole)
    whole = tokenizer.encode(prompt.text, add_special_tokens=False)
    assert result.matches_whole_string == (list(result.ids[with_bos:]) == whole)
    assert hash(result) == hash(tokenize_prompt(prompt, tokenizer, prepend_bos=prepend, allow_unk=True))


@pytest.mark.parametrize("name", ["byte-level", "byte-level-no-bos"])
@settings(max_examples=40, deadline=None)
@given(args=prompts)
def test_byte_level_pieces_are_tokenised_on_their_own(name: str, args: tuple[Any, ...]) -> None:
    prompt = ICLPrompt(*args)
    tokenizer = make(name)
    expected = [
        tuple(tokenizer.encode(piece.text, add_special_tokens=False)) if piece.text else () for piece in prompt.pieces()
    ]
    assert _pieces_of(tokenize_prompt(prompt, tokenizer)) == expected


@pytest.mark.parametrize("name", [*_METASPACE, "byte-level", "byte-level-no-bos"])
@settings(max_examples=40, deadline=None)
@given(args=prompts)
def test_token_strings_spell_the_text_with_one_dummy_prefix(name: str, args: tuple[Any, ...]) -> None:
    prompt = ICLPrompt(*args)
    tokenizer = make(name)
    result = tokenize_prompt(prompt, tokenizer, prepend_bos=False)
    if "é" in prompt.text:  # bytes of one character may be separate tokens
        return
    assert "".join(result.tokens) == " " * (name in _METASPACE) + prompt.text


@pytest.mark.parametrize("name", [*_METASPACE, "byte-level-prefix-space"])
def test_dummy_prefix_only_before_the_first_text(name: str) -> None:
    tokenizer = make(name)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ham"))[0][0] in "▁Ġ"
    result = tokenize_prompt(PROMPT, tokenizer)
    assert "".join(result.tokens[1:]) == " apple : dax\nhammer : wug\npear :"
    assert result.tokens[result.query.start][0] == "p"
    assert result.matches_whole_string
    zero = result.zero_shot()
    assert not zero.matches_whole_string  # alone, the query would have the dummy prefix
    assert "".join(zero.tokens[1:]) == "pear :"
    alone = tokenize_prompt(PROMPT.zero_shot(), tokenizer)
    assert "".join(alone.tokens[1:]) == " pear :"
    assert alone.ids != zero.ids


def test_collapsing_tokenizer_needs_another_sentinel_and_drops_line_ends() -> None:
    result = tokenize_prompt(PROMPT, make("unigram-collapsing"))
    assert "".join(result.tokens[result.query.start :]) == "pear :"
    assert result.bos is None
    assert "".join(result.tokens[result.labels[0].slice]) == " dax"


def test_spans_of_a_known_prompt() -> None:
    result = tokenize_prompt(
        ICLPrompt([("apple", "dax"), ("pear", "dax")], "apple", instruction="pear"), make("word-level")
    )
    assert result.tokens == ("<s>", "pear", "apple", ":", "dax", "pear", ":", "dax", "apple", ":")
    assert result.bos == TokenSpan(0, 1)
    assert result.instruction == TokenSpan(1, 2)
    assert result.prefix == TokenSpan(0, 2)
    assert result.demos == (TokenSpan(2, 5), TokenSpan(5, 8))
    assert result.demo_inputs == (TokenSpan(2, 4), TokenSpan(5, 7))
    assert result.labels == (TokenSpan(4, 5), TokenSpan(7, 8))
    assert result.query == TokenSpan(8, 10)
    assert result.matches_whole_string


def test_separator_belongs_to_the_demonstration_and_space_to_the_label() -> None:
    result = tokenize_prompt(PROMPT, make("byte-level"))
    label, demo = result.labels[0], result.demos[0]
    assert "".join(result.tokens[label.slice]) == " dax"
    assert "".join(result.tokens[label.stop : demo.stop]) == "\n"
    assert "".join(result.tokens[result.demo_inputs[0].slice]) == "apple :"


def test_no_merge_crosses_a_border() -> None:
    tokenizer = make("byte-level")
    glued = ICLPrompt([("ap", "ple")], "dax", Template("{input}", "{label}", ""))
    result = tokenize_prompt(glued, tokenizer)
    assert "".join(result.tokens[result.labels[0].slice]) == "ple"
    assert not result.matches_whole_string


@pytest.mark.parametrize("name", _NAMES)
def test_label_ids_are_those_in_the_prompt(name: str) -> None:
    tokenizer = make(name)
    result = tokenize_prompt(PROMPT, tokenizer, allow_unk=True)
    ids = result.ids[result.labels[0].slice]
    assert tokenize_label("dax", PROMPT.template, tokenizer, allow_unk=True) == ids


def test_readable_tokens() -> None:
    tokens = tokenize_prompt(ICLPrompt([("é", "dax")], "pear"), make("prepend")).tokens
    assert tokens[:4] == ("<s>", " ", "<0xC3>", "<0xA9>")
    assert "\n" in tokens


def test_missing_bos() -> None:
    with pytest.raises(PromptError, match=r"prepend_bos=True but the tokenizer has no BOS token: set"):
        tokenize_prompt(PROMPT, make("byte-level-no-bos"), prepend_bos=True)
    assert tokenize_prompt(PROMPT, make("byte-level-no-bos")).bos is None


def test_bos_written_in_the_text() -> None:
    prompt = ICLPrompt.from_string("<|endoftext|>apple : dax\npear :")
    with pytest.raises(PromptError, match=r"text begins with the BOS token '<\|endoftext\|>': remove it"):
        tokenize_prompt(prompt, make("byte-level"), prepend_bos=False)


def test_missing_or_foreign_tokenizer() -> None:
    with pytest.raises(PromptError, match=r"the tokenizer is missing: .*AutoTokenizer"):
        tokenize_prompt(PROMPT, None)
    with pytest.raises(PromptError, match="the tokenizer is missing"):
        tokenize_label("dax", Template(), None)


def test_raw_tokenizer_is_refused_with_a_way_out() -> None:
    from metaopt_lens.prompts._encoder import PieceEncoder

    with pytest.raises(PromptError, match=r"Hugging Face tokenizer is needed .* got Tokenizer: wrap"):
        PieceEncoder(_word_level(), allow_unk=False)


def test_require_demos() -> None:
    tokenize_prompt(PROMPT, make("byte-level"), require_demos=True)
    tokenize_prompt(PROMPT.zero_shot(), make("byte-level"))
    with pytest.raises(PromptError, match=r"no demonstrations but at least one is needed.*Give demos="):
        tokenize_prompt(PROMPT.zero_shot(), make("byte-level"), require_demos=True)


def test_context_window() -> None:
    tokenizer = make("word-level")  # BOS, 2 x 3 tokens, query 2 tokens
    assert tokenize_prompt(PROMPT, tokenizer, max_tokens=9).n_tokens == 9
    for limit, fit in ((8, 1), (6, 1), (5, 0), (3, 0)):
        with pytest.raises(
            ContextWindowError,
            match=f"9 tokens but the context window holds {limit}: the first {fit} of its 2 demonstrations",
        ):
            tokenize_prompt(PROMPT, tokenizer, max_tokens=limit)
        kept = tokenize_prompt(PROMPT.with_demos(PROMPT.demos[:fit]), tokenizer, max_tokens=limit)
        assert kept.n_tokens <= limit
    with pytest.raises(ContextWindowError, match=r"holds 2: even without demonstrations \(0 would fit\) it has 3"):
        tokenize_prompt(PROMPT, tokenizer, max_tokens=2)
    with pytest.raises(ContextWindowError, match=r"has 3 tokens .* holds 1: even without demonstrations"):
        tokenize_prompt(PROMPT.zero_shot(), tokenizer, max_tokens=1)
    with pytest.raises(OptionError, match="max_tokens must be at least 1, got 0"):
        tokenize_prompt(PROMPT, tokenizer, max_tokens=0)


def test_unknown_word() -> None:
    prompt = ICLPrompt([("apple", "blorp")], "pear")
    with pytest.raises(PromptError, match=r"does not know 'blorp' \(it becomes the unknown token '<unk>'\)"):
        tokenize_prompt(prompt, make("word-level"))
    assert "<unk>" in tokenize_prompt(prompt, make("word-level"), allow_unk=True).tokens
    with pytest.raises(PromptError, match="does not know 'blorp'"):
        tokenize_label("blorp", Template(), make("word-level"))


def test_text_without_tokens() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_word_level(), unk_token="<unk>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    with pytest.raises(PromptError, match="no token for the label of demonstration 1 ' zz': change it"):
        tokenize_prompt(ICLPrompt([("apple", "dax"), ("pear", "zz")], "pear"), tokenizer)
    with pytest.raises(PromptError, match="no token for the query 'z'"):
        tokenize_prompt(ICLPrompt([], "z", Template("{input}")), tokenizer)
    with pytest.raises(PromptError, match="no token for the label ' z': choose another"):
        tokenize_label("z", Template(), tokenizer)
    with pytest.raises(PromptError, match="the label is empty"):
        tokenize_label(" ", Template(), tokenizer)


def test_dummy_prefix_that_cannot_be_removed() -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "▁apple": 1, "▁pear": 2, "▁dax": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    prompt = ICLPrompt([("apple", "dax")], "pear", Template("{input}"))
    with pytest.raises(PromptError, match=r"a space before every text, and no way .* ' dax' .*add_prefix_space"):
        tokenize_prompt(prompt, tokenizer, allow_unk=True)


def test_tokenized_prompt_checks_its_spans() -> None:
    def build(**changes: object) -> TokenizedPrompt:
        fields: dict[str, object] = {
            "ids": (1, 2, 3),
            "tokens": ("a", "b", "c"),
            "bos": None,
            "instruction": None,
            "demos": (TokenSpan(0, 2),),
            "demo_inputs": (TokenSpan(0, 1),),
            "labels": (TokenSpan(1, 2),),
            "query": TokenSpan(2, 3),
            "matches_whole_string": True,
            "zero_shot_matches_whole_string": True,
        }
        return TokenizedPrompt(**(fields | changes))  # type: ignore[arg-type]

    assert build().prefix == TokenSpan(0, 0)
    with pytest.raises(SpanError, match="without gap or overlap: expected a span that starts at 2"):
        build(query=TokenSpan(1, 3))
    with pytest.raises(SpanError, match="must cover all 3 tokens, they end at 2"):
        build(demos=(TokenSpan(0, 1),), query=TokenSpan(1, 2))
    with pytest.raises(SpanError, match="3 ids, 2 tokens"):
        build(tokens=("a", "b"))
    with pytest.raises(SpanError, match="query needs at least one token"):
        build(demos=(TokenSpan(0, 3),), query=TokenSpan(3, 3))
    with pytest.raises(SpanError, match="1 demonstrations, 1 inputs, 0 labels"):
        build(labels=())
    with pytest.raises(SpanError, match="demonstration 0 must be an input, then a label"):
        build(labels=(TokenSpan(0, 2),))


def test_demo_objects_and_pairs_are_the_same() -> None:
    assert ICLPrompt([Demo("apple", "dax"), ("hammer", "wug")], "pear", PROMPT.template) == PROMPT
