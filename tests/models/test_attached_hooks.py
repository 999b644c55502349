"""What is on is read off the hooks attached to the model itself: late hooks, and momentum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import build, requires_hooked
from rounding import SUM, assert_agree
from torch import Tensor

from metaopt_lens import decompose, intervene, wrap
from metaopt_lens._errors import OptionError
from metaopt_lens.interventions import MomentumAttention
from metaopt_lens.models import AddsMomentum, LensModel, active_momentum
from metaopt_lens.models._hooks import Late, functions_at

TOKENS = torch.tensor([[1, 30, 31, 3]])
NAME = "blocks.1.attn.hook_v"


def test_a_late_hook_sees_what_hooks_attached_after_it_made() -> None:
    model = wrap(build("bridge:llama"))
    seen: list[Tensor] = []
    plain: list[Tensor] = []
    model.run(TOKENS, hooks=[(NAME, plain.append)])
    late = [(NAME, Late(seen.append))]
    with model.hooked(late), model.hooked([(NAME, lambda v: 2 * v)]), model.hooked([(NAME, lambda v: v + 1)]):
        model.run(TOKENS)
    torch.testing.assert_close(seen[0], 2 * plain[0] + 1)


def test_late_hooks_of_two_contexts_run_in_the_order_of_the_contexts() -> None:
    model = wrap(build("bridge:llama"))
    order: list[str] = []

    def say(word: str) -> Any:
        return lambda _: order.append(word)

    inner = [(NAME, say("plain")), (NAME, Late(say("inner")))]
    with model.hooked([(NAME, Late(say("outer")))]), model.hooked(inner):
        model.run(TOKENS)
    assert order == ["plain", "outer", "inner"]
    assert functions_at(model.hook_points[NAME]) == []


@pytest.mark.parametrize("name", ["bridge:llama", pytest.param("hooked:rotary", marks=requires_hooked)])
def test_momentum_is_found_however_its_hooks_were_attached(name: str) -> None:
    """0.1 knew of momentum only where `intervene` had announced it, and split z without it otherwise."""
    model = wrap(build(name))
    momentum = MomentumAttention([0.0, 0.5, 0.25])
    assert active_momentum(model) is None
    with model.hooked(momentum.hooks(model)):
        found = active_momentum(LensModel(model.adapter))
        assert found is not None
        torch.testing.assert_close(found, momentum.etas(model))
        result = decompose(model, "w10 : w11\nw12 :")
    assert active_momentum(model) is None
    with intervene(model.host, momentum):
        expected = decompose(model, "w10 : w11\nw12 :")
    for split in (result, expected):
        assert split.eta is not None
        parts = split.softmax.zero_shot + split.softmax.meta_gradient + split.momentum
        assert_agree(parts.reshape(split.z.shape), split.z, SUM)
    assert torch.equal(result.z, expected.z)


def test_momentum_of_two_contexts_is_joined_head_by_head() -> None:
    model = wrap(build("bridge:llama"))
    one, other = MomentumAttention(0.5, heads=["L1H0"]), MomentumAttention(0.25, heads=["L1H3", "L2H1"])
    with model.hooked(one.hooks(model)), model.hooked(other.hooks(model)):
        found = active_momentum(model)
        assert found is not None
        torch.testing.assert_close(found, one.etas(model) + other.etas(model))
        with (
            model.hooked(one.hooks(model)),
            pytest.raises(OptionError, match=r"two momentum attentions act on head L1H0"),
        ):
            active_momentum(model)


def test_a_hook_that_says_its_eta_is_enough() -> None:
    model = wrap(build("bridge:llama"))
    hook = ("blocks.2.attn.hook_z", AddsMomentum(lambda z: None, torch.tensor([0.0, 0.1, 0.0, 0.0])))
    with model.hooked([hook]):
        found = active_momentum(model)
    assert found is not None
    assert found.nonzero().tolist() == [[2, 1]]
