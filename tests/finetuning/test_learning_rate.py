"""choose_learning_rate: the rate that predicts held-out demonstrations best."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hosts import build, left_as_it_was, shared
from torch import Tensor

from metaopt_lens import Demo, ICLPrompt, MetaoptLensError, Template, load_tiny
from metaopt_lens.finetuning import choose_learning_rate, finetune
from metaopt_lens.finetuning._finetune import prepare
from metaopt_lens.finetuning._learning_rate import DEFAULT_GRID
from metaopt_lens.models import wrap
from metaopt_lens.runs import tokenize_for

TRAIN = [("w30 w31", "w32"), ("w34", "w36"), ("w38 w39", "w32"), ("w42", "w36")]
TEST = [("w50", "w32"), ("w51 w52", "w36"), ("w53", "w36")]
GOLD = [0, 1, 1]
RATES = (0.01, 0.3, 2.0)


def scores(model: Any) -> Tensor:
    """Log-probabilities of the two labels, each query run alone by the host."""
    rows = []
    for text, _ in TEST:
        ids = [1, *(int(word[1:]) for word in text.split()), 3]
        with torch.no_grad():
            rows.append(model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[[32, 36]])
    return torch.stack(rows)


def judged(found: Tensor) -> tuple[float, float]:
    hits = [float(row.argmax() == gold) for row, gold in zip(found, GOLD, strict=True)]
    loss = [-float(row.log_softmax(-1)[gold]) for row, gold in zip(found, GOLD, strict=True)]
    return sum(hits) / 3, sum(loss) / 3


@pytest.mark.parametrize(
    ("name", "settings"), [("bridge:llama", {}), ("bridge:gpt2", {"layer_causal": True, "epochs": 2})]
)
def test_accuracy_and_loss_of_every_rate_and_the_best_of_them(name: str, settings: dict[str, Any]) -> None:
    model = shared(name)
    expected = []
    for rate in RATES:
        with finetune(model, TRAIN, lr=rate, progress=False, **settings).applied(model):
            expected.append(judged(scores(model)))
    base = judged(scores(model))
    for metric in ("accuracy", "loss"):
        choice = choose_learning_rate(model, TRAIN, TEST, rates=RATES, metric=metric, **settings)  # type: ignore[arg-type]
        assert choice.accuracy == pytest.approx([a for a, _ in expected])
        assert choice.loss == pytest.approx([b for _, b in expected], rel=1e-5)
        assert (choice.base_accuracy, choice.base_loss) == (pytest.approx(base[0]), pytest.approx(base[1], rel=1e-5))
        key = (lambda e: (-e[0], e[1])) if metric == "accuracy" else (lambda e: e[1])
        assert choice.lr == RATES[min(range(len(RATES)), key=lambda i: key(expected[i]))]
        assert choice.metric == metric
    frame = choice.to_frame()
    assert frame["lr"].tolist() == list(RATES)


def test_ties_in_accuracy_go_to_the_lower_loss() -> None:
    """These rates are too small to change a prediction, so the losses decide."""
    model = shared("bridge:llama")
    rates = (0.001, 0.003, 0.002)
    choice = choose_learning_rate(model, TRAIN, TEST, rates=rates)
    assert len(set(choice.accuracy)) == 1
    assert len(set(choice.loss)) == 3
    assert choice.lr == rates[choice.loss.index(min(choice.loss))]


def test_a_prompt_gives_demonstrations_and_template() -> None:
    template = Template(input="{input} ->")
    model = shared("bridge:gpt2")
    prompt = ICLPrompt(TRAIN, "w16", template)
    first = choose_learning_rate(model, prompt, [Demo(*pair) for pair in TEST], rates=RATES)
    second = choose_learning_rate(model, TRAIN, TEST, rates=RATES, template=template)
    assert first == second
    assert first != choose_learning_rate(model, TRAIN, TEST, rates=RATES)


def test_rates_that_diverge_are_nan_and_never_chosen() -> None:
    model = build("bridge:gpt_neox")
    choose_learning_rate(model, TRAIN, TEST, rates=(0.1,))
    with left_as_it_was(model):
        choice = choose_learning_rate(model, TRAIN, TEST, rates=(1e25, 0.1))
    assert choice.lr == 0.1
    assert math.isnan(choice.loss[0])
    assert math.isnan(choice.accuracy[0])
    with pytest.raises(MetaoptLensError, match=r"diverged at every learning rate tried \(\[1e\+25, 1e\+26\]\)"):
        choose_learning_rate(model, TRAIN, TEST, rates=(1e25, 1e26))


def test_a_rate_is_given_up_once_its_loss_is_twice_that_of_guessing() -> None:
    """Its losses are finite, so `finetune` goes to the end; nobody would choose it."""
    model = load_tiny()
    demos = [("apple", "dax"), ("hammer", "wug"), ("plum", "dax"), ("saw", "wug"), ("pear", "dax")]
    held_out = [("cherry", "dax"), ("drill", "wug")]
    losses = finetune(model, demos, lr=1e4, progress=False).losses
    limit = 2 * max(losses[0], math.log(wrap(model).info.d_vocab))
    assert [loss > limit for loss in losses] == [False, False, False, True, False]
    choice = choose_learning_rate(model, demos, held_out, rates=(1e4, 0.02))
    assert math.isnan(choice.loss[0])
    assert choice.lr == 0.02


@pytest.mark.parametrize("settings", [{}, {"layer_causal": True}, {"batch_size": 3, "order": "shuffled", "epochs": 2}])
def test_rates_that_share_their_first_step_are_trained_as_if_alone(settings: dict[str, Any]) -> None:
    model = shared("bridge:llama")
    descent = prepare(model, TRAIN, template=None, prepend_bos=None, lr=1.0, **settings)
    for rate in RATES:
        shared_step, alone = descent.at(rate), finetune(model, TRAIN, lr=rate, progress=False, **settings)
        assert shared_step.settings == alone.settings
        assert shared_step.losses == alone.losses
        for name, tensor in alone.tensors().items():
            assert torch.equal(tensor, shared_step.tensors()[name])


def test_the_passes_that_rates_have_in_common_are_run_once() -> None:
    model = shared("bridge:llama")
    choose_learning_rate(model, TRAIN, TEST, rates=RATES)  # what is tried once is tried
    passes: list[int] = []
    handle = model.original_model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    try:
        choose_learning_rate(model, TRAIN, TEST, rates=RATES)
    finally:
        handle.remove()
    assert passes.count(len(TEST)) == 1 + len(RATES)  # all held-out queries in one batch
    assert passes.count(1) == 1 + len(RATES) * (len(TRAIN) - 1)


def test_an_instruction_is_run_once_for_all_held_out_queries_and_changes_nothing() -> None:
    model = shared("bridge:llama")
    prompt = ICLPrompt(TRAIN, "w16", instruction="w5 w6 w7\n")
    choice = choose_learning_rate(model, prompt, TEST, rates=RATES)
    queries = [tokenize_for(wrap(model), ICLPrompt((), text, instruction="w5 w6 w7\n")).ids for text, _ in TEST]
    for rate, loss in zip(RATES, choice.loss, strict=True):
        with finetune(model, prompt, lr=rate, progress=False).applied(model), torch.no_grad():
            rows = [model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[[32, 36]] for ids in queries]
        assert loss == pytest.approx(judged(torch.stack(rows))[1], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ()}, "needs at least one rate"),
        ({"rates": (0.1, -0.1)}, "lr must be a positive, finite number, got -0.1"),
        ({"held_out": []}, "needs at least one held-out demonstration"),
        ({"candidates": ("w32", "w40")}, r"the held-out label 'w36' is not among the candidates"),
        ({"demos": TRAIN[:1], "held_out": TEST[:1]}, "at least two candidate labels"),
        ({"candidates": ("w32", " w32", "w36")}, "'w32' and ' w32' have the same token ids"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"demos": TRAIN, "held_out": TEST} | change
    with pytest.raises(MetaoptLensError, match=message):
        choose_learning_rate(shared("bridge:gpt2"), **arguments)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_refined_search_ends_at_a_rate_better_than_both_neighbours(metric: Any) -> None:
    """Whatever it tried came out as in the search over all rates; here, of one peak, the choice is the same."""
    model = shared("bridge:llama")
    rates = (*tuple(reversed(DEFAULT_GRID)), 1.0, 2.0, 4.0, 1000000.0)
    every = choose_learning_rate(model, TRAIN, TEST, rates=rates, metric=metric)
    found = choose_learning_rate(model, TRAIN, TEST, rates=rates, metric=metric, search="refined")
    tried = [rates.index(rate) for rate in found.rates]
    assert len(tried) < len(rates)
    assert tried == sorted(tried)
    np.testing.assert_equal(found.accuracy, [every.accuracy[i] for i in tried])
    np.testing.assert_equal(found.loss, [every.loss[i] for i in tried])
    place = sorted(rates).index(found.lr)
    around = sorted(rates)[max(place - 1, 0) : place + 2]
    assert set(around) <= set(found.rates)
    score = dict(zip(found.rates, zip([-a for a in found.accuracy], found.loss, strict=True), strict=True))
    key = (lambda rate: score[rate]) if metric == "accuracy" else (lambda rate: score[rate][1:])
    assert all(key(found.lr) <= key(rate) for rate in found.rates if not math.isnan(score[rate][1]))


def test_a_refined_search_goes_down_where_all_diverge() -> None:
    model = shared("bridge:gpt_neox")
    found = choose_learning_rate(model, TRAIN, TEST, rates=(0.1, 1e25, 1e26, 1e27), search="refined")
    assert found.lr == 0.1
    assert found.rates == (0.1, 1e25)
