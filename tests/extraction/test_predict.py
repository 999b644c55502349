"""Label probabilities are those of the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_bridge
from torch import Tensor

from metaopt_lens import ICLPrompt, wrap
from metaopt_lens._errors import PromptError
from metaopt_lens.extraction import candidate_labels, label_log_probs, predict_labels
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import TokenizedPrompt, tokenize_prompt

PROMPT = ICLPrompt([("w7", "w8"), ("w9", "w10"), ("w11", "w8")], "w12", label="w10")


@pytest.fixture(scope="module")
def model() -> LensModel:
    return wrap(make_bridge("llama", dtype=torch.float64))


@pytest.fixture(scope="module")
def tokenized(model: LensModel) -> TokenizedPrompt:
    return tokenize_prompt(PROMPT, model.tokenizer)


def _host_log_probs(model: Any, ids: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        return model.host(torch.tensor([ids])).double().log_softmax(-1)[0]


def test_one_token_labels_are_read_off_the_next_token(model: LensModel, tokenized: TokenizedPrompt) -> None:
    expected = _host_log_probs(model, tokenized.ids)[-1, [8, 10, 33]]
    found = label_log_probs(model, tokenized, [[8], [10], [33]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_longer_labels_get_the_mean_over_their_tokens(model: LensModel, tokenized: TokenizedPrompt) -> None:
    label = (8, 21, 40)
    log_probs = _host_log_probs(model, tokenized.ids + label)
    last = tokenized.n_tokens - 1
    expected = torch.stack([log_probs[last + i, token] for i, token in enumerate(label)]).mean()
    found = label_log_probs(model, tokenized, [label, [9]])
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)


def test_a_prediction_holds_both_runs_in_the_candidates_order(model: LensModel, tokenized: TokenizedPrompt) -> None:
    answer = predict_labels(model, PROMPT, tokenized)
    assert answer.labels == candidate_labels(PROMPT) == ("w8", "w10")
    assert answer.correct == "w10"
    torch.testing.assert_close(answer.in_context, label_log_probs(model, tokenized, [[8], [10]]))
    torch.testing.assert_close(answer.zero_shot, label_log_probs(model, tokenized.zero_shot(), [[8], [10]]))
    assert float(answer.in_context_shares.sum()) == pytest.approx(1)
    assert answer.in_context_answer == answer.labels[int(answer.in_context.argmax())]
    assert answer.zero_shot_answer == answer.labels[int(answer.zero_shot.argmax())]


def test_candidates_may_be_named(model: LensModel, tokenized: TokenizedPrompt) -> None:
    assert predict_labels(model, PROMPT, tokenized, labels=["w20", "w21", "w20"]).labels == ("w20", "w21")
    named = ICLPrompt(PROMPT.demos, "w12", candidates=["w30", "w31"])
    assert candidate_labels(named) == ("w30", "w31")


def test_fewer_than_two_labels_are_refused(model: LensModel, tokenized: TokenizedPrompt) -> None:
    with pytest.raises(PromptError, match=r"needs at least two candidate labels, got \['w8'\]"):
        predict_labels(model, PROMPT, tokenized, labels=["w8"])
