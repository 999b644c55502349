"""A context whose sentences or paragraphs play the part of demonstrations."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from text_models import make_text_model, text_tokenizer

from metaopt_lens import ContextPrompt, ICLPrompt, decompose, finetune, head_effects, intervene, meta_gradient
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.prompts import Demo, Template, as_prompt, as_prompts, tokenize_label, tokenize_prompt
from metaopt_lens.prompts._chunks import split_chunks

TEXT = """Dr. Smith moved to Paris in 1999. He said "It rains!" He left (at 3.5 p.m.) for the U.S. office.
Rain fell, e.g. on Monday. Was it cold?

A new paragraph… it goes on. 你好。再见。"""
SENTENCES = [
    "Dr. Smith moved to Paris in 1999.",
    ' He said "It rains!"',
    " He left (at 3.5 p.m.) for the U.S. office.\n",
    "Rain fell, e.g. on Monday.",
    " Was it cold?\n\n",
    "A new paragraph… it goes on.",
    " 你好。",
    "再见。",
]
QUESTION = "Question: where?\nAnswer:"

# As Llama, Gemma and ChatML write them: BOS first or not, a system message or none.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ '[' + m['role'] + ']' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[model]' }}{% endif %}"
)


@cache
def model() -> Any:
    return make_text_model()


def chat_tokenizer(template: str) -> Any:
    import copy

    tokenizer = copy.deepcopy(text_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


# ---- chunks -----------------------------------------------------------------------------------------------------


def test_sentences_end_where_a_reader_sees_them_end() -> None:
    assert list(split_chunks(TEXT, "sentence")) == SENTENCES


def test_lines_and_paragraphs() -> None:
    assert [len(split_chunks(TEXT, kind)) for kind in ("line", "paragraph")] == [3, 2]
    assert split_chunks("one\ntwo\n\nthree", "line") == ("one\n", "two\n\n", "three")
    assert split_chunks("one\ntwo\n \nthree", "paragraph") == ("one\ntwo\n \n", "three")


@example(text="?\n\n ?", kind="sentence")  # a blank line and the end of a sentence, each with a border of its own once
@given(text=st.text('aB .!?\n"“。', min_size=1).filter(lambda t: t.strip()), kind=st.sampled_from(["sentence", "line"]))
def test_chunks_joined_are_the_text(text: str, kind: Any) -> None:
    chunks = split_chunks(text, kind)
    assert "".join(chunks) == text
    assert all(chunk.strip() for chunk in chunks)


# ---- text and spans ---------------------------------------------------------------------------------------------


def test_the_text_is_context_and_query() -> None:
    prompt = ContextPrompt(TEXT, QUESTION, instruction="Read.\n")
    assert prompt.text == f"Read.\n\n{TEXT}\n\n{QUESTION}"
    assert prompt.zero_shot().text == f"Read.\n\n{QUESTION}"
    assert [demo.input for demo in prompt.demos] == [*SENTENCES[:-1], SENTENCES[-1] + "\n\n"]
    assert prompt.without_demo(0).text == f"Read.\n\n{TEXT[len(SENTENCES[0]) + 1 :]}\n\n{QUESTION}"
    assert prompt.without_demo(3).text == f"Read.\n\n{TEXT.replace(SENTENCES[3], '')}\n\n{QUESTION}"


def test_listed_chunks_are_joined_with_line_ends_where_they_have_no_space() -> None:
    assert ContextPrompt(["one", "two ", "three"], "Q").text == "one\ntwo three\n\nQ"
    assert ContextPrompt(("one\n\n", "two"), "Q").text == "one\n\ntwo\n\nQ"


@pytest.mark.parametrize("chunks", ["sentence", "line", "paragraph"])
def test_spans_hold_the_chunks_and_the_ids_are_those_of_the_whole_text(chunks: Any) -> None:
    tokenizer = text_tokenizer()
    prompt = ContextPrompt(TEXT, QUESTION, chunks=chunks)
    found = tokenize_prompt(prompt, tokenizer)
    assert found.matches_whole_string
    assert list(found.ids[1:]) == tokenizer.encode(prompt.text, add_special_tokens=False)
    for span, demo in zip(found.demos, prompt.demos, strict=True):
        assert tokenizer.decode(found.ids[span.slice]) == demo.input
    for text, label, span in zip(found.demo_inputs, found.labels, found.demos, strict=True):
        assert (text.start, len(label)) == (span.start, 0)
    assert tokenizer.decode(found.ids[found.query.slice]) == QUESTION


# ---- chat templates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "role", "instruction"),
    [(CHATML, "user", None), (CHATML, "user", "Be brief."), (CHATML, "system", "Be brief."), (WITH_BOS, "user", None)],
)
def test_chat_templates_stand_around_the_spans(template: str, role: Any, instruction: str | None) -> None:
    """The text is what the tokenizer's own call gives for these messages; the spans lie inside it."""
    tokenizer = chat_tokenizer(template)
    prompt = ContextPrompt(TEXT, "Where?", chat=tokenizer, role=role, instruction=instruction)
    if role == "user":
        messages = [{"role": "user", "content": f"{TEXT}\n\nWhere?"}]
        messages = [*([{"role": "system", "content": instruction}] if instruction else []), *messages]
    else:
        messages = [{"role": "system", "content": f"{instruction}\n\n{TEXT}"}, {"role": "user", "content": "Where?"}]
    own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.text == own
    found = tokenize_prompt(prompt, tokenizer, prepend_bos=template is WITH_BOS)
    assert list(found.ids) == tokenizer.encode(own, add_special_tokens=False)
    assert (found.bos is not None) == (template is WITH_BOS)
    for span, demo in zip(found.demos, prompt.demos, strict=True):
        assert tokenizer.decode(found.ids[span.slice]) == demo.input
    assert "Where?" in tokenizer.decode(found.ids[found.query.slice])
    label = tokenize_label("Paris", prompt.template, tokenizer)
    assert tokenizer.decode(label) == "Paris"  # no space: a line begins


def test_bos_that_a_chat_template_writes_is_not_there_twice() -> None:
    tokenizer = chat_tokenizer(WITH_BOS)
    prompt = ContextPrompt(TEXT, "Where?", chat=tokenizer)
    for prepend in (True, None, False):
        ids = tokenize_prompt(prompt, tokenizer, prepend_bos=prepend).ids
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


# ---- everything downstream sees spans ---------------------------------------------------------------------------


def test_the_split_is_per_sentence() -> None:
    prompt = ContextPrompt(TEXT, QUESTION, label="Paris in France")
    result = decompose(model(), prompt)
    parts = result.per_demo()
    assert parts.shape[-2] == len(SENTENCES)
    torch.testing.assert_close(parts.sum(-2), result.softmax.meta_gradient)
    answer = result.predict()
    assert answer.labels == ("Paris in France",)


def test_an_answer_of_several_tokens_is_read_token_by_token() -> None:
    prompt = ContextPrompt(TEXT, QUESTION, label="Paris in France")
    label = tokenize_label("Paris in France", prompt.template, text_tokenizer())
    assert len(label) > 2
    ids = prompt.tokens(model()).ids
    with torch.no_grad():
        log_probs = model()(torch.tensor([[*ids, *label]]))[0].log_softmax(-1)
    own = [float(log_probs[len(ids) - 1 + i, token]) for i, token in enumerate(label)]
    score = float(decompose(model(), prompt).predict().in_context[0])
    assert score == pytest.approx(sum(own) / len(own), abs=1e-5)
    effects = head_effects(model(), prompt, metric="label_log_prob")
    assert float(effects.in_context) == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert effects.demo_exact.shape[-1] == len(SENTENCES)


def test_a_meta_gradient_of_a_context_makes_the_in_context_run() -> None:
    prompt = ContextPrompt(TEXT, QUESTION, instruction="Read.")
    found = prompt.tokens(model())
    update = meta_gradient(model(), prompt)
    assert update.prompt(QUESTION).text == prompt.text
    with torch.no_grad():
        expected = model()(torch.tensor([found.ids]))[0, -1]
        with intervene(model(), update):
            merged = model()(torch.tensor([found.zero_shot().ids]))[0, -1]
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


def test_results_and_meta_gradients_are_stored_with_their_chunks(tmp_path: Any) -> None:
    prompt = ContextPrompt(TEXT, QUESTION, chat=chat_tokenizer(CHATML))
    result = decompose(model(), prompt)
    loaded = type(result).load(result.save(tmp_path / "result"))
    assert (loaded.prompt.text, loaded.prompt.demos) == (prompt.text, prompt.demos)
    update = meta_gradient(model(), prompt)
    assert type(update).load(update.save(tmp_path / "update")).prompt("Where?").text == update.prompt("Where?").text


def test_chunks_can_be_trained_on_but_have_no_labels() -> None:
    prompt = ContextPrompt(TEXT, QUESTION)
    update = finetune(model(), prompt, lr=1e-3)
    assert len(update.losses) == len(SENTENCES)
    with pytest.raises(PromptError, match="the chunks of a context have none: use loss='all'"):
        finetune(model(), prompt, lr=1e-3, loss="label")


def test_prompt_files_and_dicts_can_give_a_context() -> None:
    item: Any = {"context": TEXT, "chunks": "paragraph", "queries": [QUESTION, "Who?"], "labels": ["Paris", "He"]}
    expected = [
        ContextPrompt(TEXT, query, chunks="paragraph", label=label)
        for query, label in zip(item["queries"], item["labels"], strict=True)
    ]
    found = as_prompts(item)
    assert [(p.text, p.demos, p.label) for p in found] == [(p.text, p.demos, p.label) for p in expected]
    assert as_prompt({"context": ["one", "two"], "query": "Q"}).text == "one\ntwo\n\nQ"
    for wrong, message in (
        ({"context": TEXT, "demos": []}, r"in place of \"demos\" and \"template\", so give no 'demos'"),
        ({"context": 3}, r'"context" must be a list of strings, got a number'),
        ({"context": TEXT, "chunks": "word"}, r"the prompt: chunks must be one of 'sentence'"),
        ({"demos": [["a", "b"]], "chunks": "line"}, r'"chunks" goes with "context"'),
    ):
        with pytest.raises(PromptError, match=message):
            as_prompts({"query": "Q", **wrong})


# ---- refused ----------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    tokenizer = text_tokenizer()
    with pytest.raises(PromptError, match=r"has no chat template: leave chat out"):
        ContextPrompt(TEXT, QUESTION, chat=tokenizer)
    with pytest.raises(PromptError, match=r"refuses these messages \(no system role\): try another role"):
        ContextPrompt(TEXT, QUESTION, chat=chat_tokenizer(WITH_BOS), role="system")
    with pytest.raises(PromptError, match=r"does not show the context and then the query, once each"):
        ContextPrompt(TEXT, QUESTION, chat=chat_tokenizer("{{ messages[0]['content'] }}" * 2))
    with pytest.raises(PromptError, match=r"single chunk, and without it none is left: cut it finer"):
        ContextPrompt("One sentence.", QUESTION).without_demo(0)
    with pytest.raises(PromptError, match=r"no demonstration 9 to leave out: the prompt has 8"):
        ContextPrompt(TEXT, QUESTION).without_demo(9)
    with pytest.raises(PromptError, match="the context is empty: give the text"):
        ContextPrompt(" \n", QUESTION)
    with pytest.raises(PromptError, match="the context is empty: give at least one chunk"):
        ContextPrompt([], QUESTION)
    with pytest.raises(PromptError, match=r"chunk 1 of the context must be a text and not empty, got ' '"):
        ContextPrompt(["one", " "], QUESTION)
    with pytest.raises(PromptError, match="the query is empty"):
        ContextPrompt(TEXT, " ")
    with pytest.raises(OptionError, match="chunks must be one of 'sentence', 'line', 'paragraph', got 'word'"):
        ContextPrompt(TEXT, QUESTION, chunks="word")
    with pytest.raises(OptionError, match="role must be 'user' or 'system', got 'tool'"):
        ContextPrompt(TEXT, QUESTION, role="tool")
    with pytest.raises(PromptError, match=r"chunk 0 of the context must be a text without label"):
        ICLPrompt([Demo("one", "two")], "Q", Template("{input}", query="{query}"))
