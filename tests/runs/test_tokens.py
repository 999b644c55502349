"""BOS follows the host's default, the result says so, and warns where the model's own call gives other ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import bridge_of, make_hf
from hosts import HOOKED_NAMES, build, prompt, shared
from torch import Tensor

from metaopt_lens import (
    Decomposition,
    ICLPrompt,
    Template,
    choose_learning_rate,
    compare,
    decompose,
    finetune,
    meta_gradient,
    wrap,
)
from metaopt_lens.models.tiny import load_tiny
from metaopt_lens.runs import tokenize_for

PROMPT = prompt()


def with_default(name: str, default: bool) -> Any:
    model = build(name)
    model.cfg.default_prepend_bos = default
    return model


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("name", ["bridge:gpt2", *HOOKED_NAMES[:1]])
def test_every_entry_follows_the_hosts_default(name: str, default: bool) -> None:
    """0.1 put BOS first wherever the tokenizer had one."""
    model = with_default(name, default)
    found = decompose(model, PROMPT)
    assert list(found.tokenized.ids) == model.to_tokens(PROMPT.text)[0].tolist()
    assert (found.tokenized.bos is not None) is default
    mg = meta_gradient(model, PROMPT)
    assert mg.tokens.ids == found.tokenized.ids[: mg.tokens.stop]
    update = finetune(model, PROMPT, lr=0.1, progress=False)
    assert update.trained_on is not None
    assert all((ids[0] == 1) is default for ids in update.trained_on)
    pair = [PROMPT, prompt(query="w40 :")]
    compare(model, pair, update, controls="quick", progress=False)  # the same ids, or it refuses


def test_a_family_that_is_used_without_bos_gets_none() -> None:
    model = bridge_of(make_hf("bloom"), bos=None)
    assert model.cfg.default_prepend_bos is False
    found = tokenize_for(wrap(model), PROMPT)
    assert found.bos is None
    assert found.bos_note == "No BOS before the text (the model's default)."
    assert found.warning is None


def test_the_result_says_who_decided_and_warns_of_other_ids(tmp_path: Any) -> None:
    model = wrap(with_default("bridge:gpt2", True))
    usual = tokenize_for(model, PROMPT)
    assert usual.bos_note == "BOS '<bos>' stands before the text (the model's default)."
    assert usual.warning is None
    asked = tokenize_for(model, PROMPT, prepend_bos=False)
    assert asked.bos_note == "No BOS before the text (prepend_bos=False)."
    assert asked.warning == "The model's own call, model.to_tokens(text), puts BOS first."
    assert asked.zero_shot().warning == asked.warning
    saved = decompose(model, PROMPT, prepend_bos=False)
    saved.save(tmp_path / "result")
    assert Decomposition.load(tmp_path / "result").tokenized == asked


def test_without_a_default_of_the_host_its_tokenizer_decides() -> None:
    model = build("bridge:gpt2")
    del model.cfg.default_prepend_bos
    if "default_prepend_bos" in dir(model.cfg):  # the class has the default too
        model.cfg.default_prepend_bos = None
    found = tokenize_for(wrap(model), PROMPT)
    assert model.tokenizer.encode("w16")[0] == 1  # TransformerLens loads tokenizers so that they put it there
    assert found.bos_note == "BOS '<bos>' stands before the text (as its tokenizer does by itself)."


def test_the_bundled_model_keeps_its_bos() -> None:
    found = tokenize_for(wrap(load_tiny()), ICLPrompt.from_string("apple : dax\nhammer : wug\npear :"))
    assert found.bos is not None
    assert found.warning is None


# ---- choosing a learning rate ---------------------------------------------------------------------------------------

TRAIN = [("w30 w31", "w32"), ("w34", "w36")]
TEST = [("w50", "w32"), ("w51 w52", "w36")]


def _loss(model: Any, start: list[int]) -> float:
    """Of the right label among the two, each held-out query run alone by the host."""
    total = 0.0
    for text, label in TEST:
        ids = [*start, *(int(word[1:]) for word in text.split()), 3]
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([ids]))[0, -1].double()[[32, 36]]
        total -= float(logits.log_softmax(-1)[int(label == "w36")])
    return total / len(TEST)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("instruction", [None, "w20 w21"])
def test_a_learning_rate_is_judged_on_the_prompt_that_is_trained(bos: bool, instruction: str | None) -> None:
    """0.1 trained without BOS and judged with it, and dropped the instruction when judging."""
    model = shared("bridge:gpt2")
    text = ICLPrompt(TRAIN, "w50", Template(), instruction)
    choice = choose_learning_rate(model, text, TEST, rates=[0.3], prepend_bos=bos)
    start = [1] * bos + ([20, 21, 4] if instruction else [])
    assert choice.base_loss == pytest.approx(_loss(model, start), rel=1e-5)
    with finetune(model, text, lr=0.3, prepend_bos=bos, progress=False).applied(model):
        assert choice.loss[0] == pytest.approx(_loss(model, start), rel=1e-5)
