"""A decomposition leaves no trace in the model, whether it ends well, in an exception or in Ctrl-C."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import make_hf
from hosts import HOOKED_NAMES, HOST_NAMES, build, left_as_it_was, prompt
from torch import Tensor

from metaopt_lens import decompose, wrap
from metaopt_lens._errors import SpanError

PROMPT = prompt()
FEW = ["bridge:gpt2", "bridge:gemma2", "bridge:gptj", "bridge:gpt_oss", *HOOKED_NAMES[:4]]
DROPOUT = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}


class Calls:
    """A user's own hook that counts, and raises from some call on."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.n = 0
        self.error = error

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        self.n += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("name", HOST_NAMES)
def test_after_success(name: str) -> None:
    model = build(name)
    own = Calls()
    model.hook_dict["blocks.1.attn.hook_z"].add_hook(own)
    with left_as_it_was(model):
        decompose(model, [PROMPT, prompt(2)], position="all")
    counted = own.n
    model(torch.tensor([[1, 2, 3]]))
    assert own.n == counted + 1  # still there, still once


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("blocks.0.attn.hook_z", KeyboardInterrupt()),
        ("blocks.2.attn.hook_v", RuntimeError("user's own")),
        ("blocks.1.attn.hook_q", SystemExit(3)),
    ],
)
@pytest.mark.parametrize("name", FEW)
def test_after_an_error_inside_a_pass(name: str, error: BaseException, hook: str) -> None:
    model = build(name)
    wrap(model)
    own = Calls()
    model.hook_dict[hook].add_hook(own)
    with left_as_it_was(model):
        own.error = error
        with pytest.raises(type(error)) as caught:
            decompose(model, PROMPT)
        assert caught.value is error
        own.error = None


def test_after_an_error_in_the_second_of_three_passes() -> None:
    model = build("bridge:gpt2")
    wrap(model)

    class Third(Calls):
        def __call__(self, tensor: Tensor, hook: Any) -> None:
            self.n += 1
            if self.n == 3:  # 1 and 2: prefix pass, joint pass; 3: plain zero-shot pass
                raise KeyboardInterrupt

    own = Third()
    model.hook_dict["blocks.1.attn.hook_z"].add_hook(own)
    before = own.n
    with left_as_it_was(model):
        own.n = 0
        with pytest.raises(KeyboardInterrupt):
            decompose(model, PROMPT)
        own.n = 100
    assert before == 0


@pytest.mark.parametrize("name", FEW)
def test_after_a_refused_position(name: str) -> None:
    model = build(name)
    with left_as_it_was(model), pytest.raises(SpanError):
        decompose(model, PROMPT, position=3)


@pytest.mark.parametrize("name", FEW)
def test_modes_of_single_modules_come_back(name: str) -> None:
    """Also where they are mixed: some modules training, some not; one parameter frozen."""
    model = build(name)
    modules = [m for m in model.modules() if m is not model]
    for i, module in enumerate(modules):
        module.training = i % 3 == 0
    next(model.parameters()).requires_grad_(False)
    with left_as_it_was(model):
        decompose(model, PROMPT)
        with pytest.raises(SpanError):
            decompose(model, PROMPT, position=-40)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_global_grad_state_is_not_touched(enabled: bool) -> None:
    model = build("bridge:gpt2")
    with torch.set_grad_enabled(enabled):
        for grad in (True, False):
            decompose(model, PROMPT, grad=grad)
            assert torch.is_grad_enabled() is enabled
            with pytest.raises(SpanError):
                decompose(model, PROMPT, grad=grad, position=0)
            assert torch.is_grad_enabled() is enabled


def test_the_global_random_state_is_not_touched() -> None:
    model = build("bridge:gpt2")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    decompose(model, PROMPT)
    assert torch.equal(torch.rand(4), expected)


def test_dropout_in_training_mode_does_not_reach_the_result() -> None:
    from families import bridge_of

    model = bridge_of(make_hf("gpt2", **DROPOUT))
    expected = decompose(model, PROMPT)
    model.train()
    tokens = torch.tensor([[1, 30, 31, 3]])
    assert not torch.equal(model(tokens), model(tokens))  # dropout is on
    with left_as_it_was(model):
        for _ in range(2):
            again = decompose(model, PROMPT)
            assert torch.equal(again.z, expected.z)
            assert torch.equal(again.z_position_matched, expected.z_position_matched)  # type: ignore[arg-type]
    assert model.training


def test_results_do_not_change_when_the_model_does() -> None:
    """A result holds copies, not views of tensors the host goes on using."""
    model = build("bridge:gpt2")
    result = decompose(model, PROMPT, position="all")
    kept = result.softmax.meta_gradient.clone(), result.runs.icl.own_v.clone(), result.runs.icl.prefix.k[1].clone()
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            parameter.zero_()
    model(torch.tensor([[1, 2, 3]]))
    for now, then in zip(
        (result.softmax.meta_gradient, result.runs.icl.own_v, result.runs.icl.prefix.k[1]), kept, strict=True
    ):
        assert torch.equal(now, then)
