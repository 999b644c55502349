"""choose_learning_rate: the rate that predicts held-out demonstrations best."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosts import build, left_as_it_was, shared
from torch import Tensor

from metaopt_lens import Demo, ICLPrompt, MetaoptLensError, Template
from metaopt_lens.finetuning import choose_learning_rate, finetune

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
