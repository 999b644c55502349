"""Prompts and templates as text: joining, reading back, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaopt_lens._errors import PromptError
from metaopt_lens.prompts import Demo, ICLPrompt, Piece, Template

words = st.text("ab:->. {}é\t", min_size=1, max_size=9).filter(lambda s: s.strip())


def test_text_is_the_pieces_joined() -> None:
    template = Template("In: {input}", "->{label}", ";", "\n\n")
    prompt = ICLPrompt([("a", "x"), ("b", "y")], "c", template, "Do it")
    assert prompt.text == "Do it\n\nIn: a->x;In: b->y;In: c"
    assert prompt.pieces()[:4] == (
        Piece("instruction", "Do it\n\n"),
        Piece("input", "In: a", 0),
        Piece("label", "->x", 0),
        Piece("separator", ";", 0),
    )
    assert prompt.pieces()[-1] == Piece("query", "In: c")
    assert ICLPrompt([("a", "x")], "c", instruction="Do it").text == "Do it\na: x\nc:"
    assert prompt.zero_shot().text == "Do it\n\nIn: c"


@given(demos=st.lists(st.tuples(words, words), max_size=3), query=words, instruction=st.none() | words)
def test_pieces_join_and_inputs_with_braces_are_safe(
    demos: list[tuple[str, str]], query: str, instruction: str | None
) -> None:
    prompt = ICLPrompt(demos, query, Template(), instruction)
    lines = [f"{text.strip()}: {label.strip()}" for text, label in demos] + [f"{query.strip()}:"]
    if instruction is not None:
        lines.insert(0, instruction.strip())
    assert prompt.text == "\n".join(lines)
    assert prompt.text == "".join(piece.text for piece in prompt.pieces())
    assert ICLPrompt(prompt.demos, prompt.query, Template(), prompt.instruction) == prompt


def test_frozen_hashable_and_helpers() -> None:
    prompt = ICLPrompt([("{input}", "{label}"), (" b ", "y ")], " c\n", label=" x ", candidates=["x", "y"])
    assert prompt.text == "{input}: {label}\nb: y\nc:"
    assert (prompt.demos[1], prompt.query, prompt.label) == (Demo("b", "y"), "c", "x")
    assert prompt.candidates == ("x", "y")
    assert hash(prompt) == hash(ICLPrompt(prompt.demos, "c", label="x", candidates=("x", "y")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.query = "d"  # type: ignore[misc]
    assert prompt.zero_shot() == ICLPrompt([], "c", label="x", candidates=["x", "y"])
    assert prompt.without_demo(0) == prompt.with_demos(prompt.demos[1:])
    assert dataclasses.replace(prompt, query="d").demos == prompt.demos
    for index in (-1, 2):
        with pytest.raises(PromptError, match=f"no demonstration {index} to leave out: the prompt has 2"):
            prompt.without_demo(index)


def test_from_string_example() -> None:
    prompt = ICLPrompt.from_string("\napple : dax\nhammer : wug\npear :\n", label="dax", candidates=["dax", "wug"])
    assert prompt.demos == (Demo("apple :", "dax"), Demo("hammer :", "wug"))
    assert prompt.query == "pear :"
    assert prompt.template == Template("{input}", " {label}", "\n")
    assert prompt.label == "dax"


@pytest.mark.parametrize(
    ("text", "demos", "query"),
    [
        ("a -> b\nc ->", [("a ->", "b")], "c ->"),
        ("a:b\nc:", [("a:", "b")], "c:"),
        ("one two\nthree", [("one", "two")], "three"),
        ("12:30 -> noon\n1:00 ->", [("12:30 ->", "noon")], "1:00 ->"),
        ("x -> y : two words\nz", [("x -> y :", "two words")], "z"),
        ("S: a\nL: x\n\nS: b\nL: y\n\nS: {c}\nL:", [("S: a\nL:", "x"), ("S: b\nL:", "y")], "S: {c}\nL:"),
        ("Q: a\nA:\nb\n\nQ: c", [("Q: a\nA:", "b")], "Q: c"),
        ("a : b\npear : dax", [("a :", "b")], "pear : dax"),  # a labelled last block stays as it is
        ("a  x : b\n   c :", [("a  x :", "b")], "c :"),
        ("a : b\n  \n\t\nc :", [("a :", "b")], "c :"),
    ],
)
def test_from_string_reads_and_round_trips(text: str, demos: list[tuple[str, str]], query: str) -> None:
    prompt = ICLPrompt.from_string(text)
    assert prompt.demos == tuple(Demo(*demo) for demo in demos)
    assert prompt.query == query
    assert prompt.text == text
    windows = text.replace("\n", "\r\n")
    assert ICLPrompt.from_string(windows) == prompt
    assert ICLPrompt.from_string(text.replace("\n", "\r")) == prompt


@given(st.text("ab:-> \n\t\r\x0b\x85é{}", max_size=40))
def test_from_string_round_trips_or_refuses(text: str) -> None:
    try:
        prompt = ICLPrompt.from_string(text)
    except PromptError:
        return
    assert prompt.text == text.replace("\r\n", "\n").replace("\r", "\n").strip()
    assert prompt.demos


@given(
    st.lists(st.tuples(st.text("abc .", min_size=1), st.text("abc", min_size=1)), min_size=1, max_size=4),
    st.text("abc .", min_size=1),
    st.sampled_from(["\n", "\n\n", " \n\n\n  "]),
    st.sampled_from(["", " ", "  ", "\t"]),
    st.sampled_from([":", "->"]),
)
def test_from_string_never_refuses_a_regular_prompt(
    pairs: list[tuple[str, str]], query: str, separator: str, space: str, mark: str
) -> None:
    blocks = [f"x{text}{mark}{space}{label}" for text, label in pairs]
    text = separator.join([*blocks, f"x{query}{mark}"])
    prompt = ICLPrompt.from_string(text)
    assert prompt.text == text
    assert [demo.label for demo in prompt.demos] == [label for _, label in pairs]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the prompt is empty: write it as"),
        (" \n ", r"the prompt is empty"),
        ("pear :", r"no demonstration: it is the single block 'pear :'\. Write the demonstrations before"),
        ("a : b\nc :\nd :", r"block 2 \('c :'\) has no label after its last ':': only the last block"),
        ("c ->\nd ->", r"block 1 \('c ->'\) has no label after its last '->'"),
        (
            "a : b\nc :d\ne :",
            r"block 2 \('c :d'\) has '' before its label but block 1 has ' ': write the same",
        ),
        (
            "a b\nword\nc",
            r"block 2 \('word'\) is a single word, so it has no label: write a demonstration as",
        ),
        (
            "a : b\nc : d  \ne :",
            r"block 2 \('c : d'\) is followed by '  \\n' but block 1 by '\\n': put the same",
        ),
        ("a : b\n\nc : d\n\n\ne :", r"block 2 .* is followed by .* the same separator \(a blank line\)"),
        ("a : " + "b" * 50 + "\nc :\nd :", r"block 2"),
        ("b" * 50, r"single block '" + "b" * 37 + r"\.\.\.'"),
    ],
)
def test_from_string_refuses(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ICLPrompt.from_string(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": " "}, "the query is empty: give the input"),
        ({"demos": [("a", "b"), ("", "b")]}, "the input of demonstration 1 is empty"),
        ({"demos": [("a", "b"), ("a", "b"), ("a", " ")]}, "the label of demonstration 2 is empty"),
        ({"instruction": ""}, "the instruction is empty: give its text, or None"),
        ({"label": ""}, "the query's label is empty: give a word, or None"),
        ({"candidates": []}, r"candidates need at least one word and no empty one, got \[\]"),
        ({"candidates": ["a", ""]}, r"no empty one, got \['a', ''\]"),
        ({"candidates": ["a", "b", "a "]}, r"candidates are named more than once \(a\)"),
        ({"candidates": "ab"}, "candidates must be a list of words, got the string 'ab'"),
        ({"candidates": ["a"], "label": "b"}, r"label 'b' is not among the candidates \(a\)"),
    ],
)
def test_prompt_refuses(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"demos": [("a", "b")], "query": "c"}
    with pytest.raises(PromptError, match=message):
        ICLPrompt(**(good | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("demo", ["ab", ("a",), ("a", 1), None])
def test_what_is_no_demonstration(demo: object) -> None:
    from metaopt_lens.prompts._prompt import _clean_demo

    with pytest.raises(PromptError, match=r"demonstration 3 must be a Demo or an \(input, label\) pair"):
        _clean_demo(3, demo)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": "Review:"}, r"template's input 'Review:' has no \{input\}: it needs \{input\} once"),
        ({"input": "{input} {input}"}, r"has \{input\} more than once"),
        ({"input": "{premise} {input}:"}, r"has a placeholder that nothing fills: \{premise\}"),
        ({"input": "{} {input}:"}, r"nothing fills: \{\}"),
        ({"label": " {input}"}, r"template's label ' \{input\}' has no \{label\}"),
        ({"label": " {label} {x}"}, r"nothing fills: \{x\}"),
        ({"input": "{input} : "}, r"'\{input\} : ' ends with white space: .*write label=' \{label\}'"),
    ],
)
def test_template_refuses(fields: dict[str, str], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Template(**fields)
