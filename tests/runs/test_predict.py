"""Label probabilities are those of the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_bridge
from torch import Tensor

from metaopt_lens import Decomposition, ICLPrompt, decompose, finetune, wrap
from metaopt_lens._errors import ModelMismatchError, PromptError
from metaopt_lens.models import LensModel
from metaopt_lens.models.tiny import load_tiny
from metaopt_lens.prompts import TokenizedPrompt, tokenize_prompt
from metaopt_lens.runs import candidate_labels, label_log_probs, predict_labels, small_mass_note

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


def test_the_right_label_is_always_a_candidate() -> None:
    """Open answers: the query's label is that of no demonstration."""
    assert candidate_labels(ICLPrompt(PROMPT.demos, "w12", label="w30")) == ("w8", "w10", "w30")
    assert candidate_labels(ICLPrompt(PROMPT.demos, "w12", label="w10")) == ("w8", "w10")
    assert candidate_labels(ICLPrompt((), "w12", label="w30")) == ("w30",)
    assert candidate_labels(ICLPrompt((), "w12")) == ()


def test_probabilities_are_those_of_the_whole_vocabulary(model: LensModel) -> None:
    """Probability of a label of several tokens is the product; the candidates' mass counts what is contained once."""
    prompt = ICLPrompt(PROMPT.demos, "w12", label="w40 w41", candidates=("w8", "w8 w9", "w40 w41"))
    tokenized = tokenize_prompt(prompt, model.tokenizer)
    found = predict_labels(model, prompt, tokenized)
    for own, ids in (
        (found.in_context_vocabulary, tokenized.ids),
        (found.zero_shot_vocabulary, tokenized.zero_shot().ids),
    ):
        first = _host_log_probs(model, ids)[-1].exp()
        second = {t: _host_log_probs(model, (*ids, t))[-1].exp() for t in (8, 40)}
        expected = torch.stack([first[8], first[8] * second[8][9], first[40] * second[40][41]])
        torch.testing.assert_close(own.probabilities, expected, atol=0, rtol=1e-5)
        assert own.mass == pytest.approx(float(expected[0] + expected[2]), rel=1e-5)
        assert own.rank == int(first.argsort(descending=True).tolist().index(40)) + 1
        assert [token.text.strip() for token in own.top] == [f"w{i}" for i in first.topk(5).indices.tolist()]
        assert [token.probability for token in own.top] == pytest.approx(first.topk(5).values.tolist(), rel=1e-5)


def test_a_small_mass_is_said(model: LensModel, tokenized: TokenizedPrompt) -> None:
    found = predict_labels(model, PROMPT, tokenized)
    assert found.in_context_vocabulary.mass < 0.5
    assert found.mass_note is not None
    assert f"only {found.zero_shot_vocabulary.mass:.1%} zero-shot and" in found.mass_note
    half = small_mass_note({"zero-shot": 0.5, "in context": 0.123})
    assert half is not None
    assert "only 12.3% in context" in half
    assert small_mass_note({"zero-shot": 0.5, "in context": 1.0}) is None


def test_one_candidate_or_none_still_has_an_answer(model: LensModel, tokenized: TokenizedPrompt) -> None:
    one = predict_labels(model, PROMPT, tokenized, labels=["w8"])
    assert one.in_context_answer == one.zero_shot_answer == "w8"
    both = predict_labels(model, PROMPT, tokenized)
    torch.testing.assert_close(one.in_context, both.in_context[:1])
    bare = ICLPrompt((), "w12")
    none = predict_labels(model, bare, tokenize_prompt(bare, model.tokenizer))
    assert none.labels == ()
    assert none.in_context_answer is None
    assert none.in_context_vocabulary.rank is None
    assert none.mass_note is None
    assert len(none.in_context_vocabulary.top) == 5


def test_labels_with_the_same_tokens_are_refused(model: LensModel, tokenized: TokenizedPrompt) -> None:
    with pytest.raises(PromptError, match="'w8' and ' w8' have the same token ids"):
        predict_labels(model, PROMPT, tokenized, labels=["w8", " w8"])


def test_a_decomposition_predicts(model: LensModel, tokenized: TokenizedPrompt, tmp_path: Path) -> None:
    """From its recorded runs, without another pass; labels that were not foreseen are run."""
    result = decompose(model, PROMPT)
    expected, passes = predict_labels(model, PROMPT, tokenized), []

    def count(x: Tensor, hook: Any) -> None:
        passes.append(x.shape[1])

    with model.host.hooks(fwd_hooks=[("blocks.0.hook_in", count)]):
        found = result.predict()
        assert passes == []
        named = result.predict(labels=["w20", "w21 w22"])
        assert passes == [tokenized.n_tokens + 1, tokenized.zero_shot().n_tokens + 1]  # and the label's first token
    assert named.labels == ("w20", "w21 w22")
    own = predict_labels(model, PROMPT, tokenized, labels=named.labels)
    for one, other in ((found, expected), (named, own)):
        torch.testing.assert_close(one.in_context, other.in_context)
        torch.testing.assert_close(one.zero_shot, other.zero_shot)
        for setting in ("in_context_vocabulary", "zero_shot_vocabulary"):
            ours, theirs = getattr(one, setting), getattr(other, setting)
            assert [t.text for t in ours.top] == [t.text for t in theirs.top]
            assert (ours.rank, ours.mass) == (theirs.rank, pytest.approx(theirs.mass))
    result.save(tmp_path / "result")
    with pytest.raises(ModelMismatchError, match=r"predictions need the model: call with_model\(model\)"):
        Decomposition.load(tmp_path / "result").predict()
    loaded = Decomposition.load(tmp_path / "result", model=model).predict()
    torch.testing.assert_close(loaded.in_context, found.in_context)


def test_a_decomposition_answers_as_the_model_did() -> None:
    """Under what acted on the model when it was made, also when asked later."""
    model = wrap(make_bridge("llama", dtype=torch.float64))
    update = finetune(model, PROMPT, lr=0.5, progress=False)
    with update.applied(model):
        changed = decompose(model, PROMPT)
        inside = predict_labels(model, PROMPT, changed.tokenized)
    torch.testing.assert_close(changed.predict().in_context, inside.in_context)
    assert (changed.predict().in_context - decompose(model, PROMPT).predict().in_context).abs().max() > 1e-3


def test_labels_the_tokenizer_does_not_know_are_left_to_whoever_asks() -> None:
    prompt = ICLPrompt([("apple", "dax"), ("hammer", "wug")], "plum", candidates=("dax", "nowhere"))
    result = decompose(load_tiny(), prompt)
    with pytest.raises(PromptError, match="nowhere"):
        result.predict()
    assert result.predict(labels=["dax"]).labels == ("dax",)
