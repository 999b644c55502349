"""A decomposition is of the model's own attention, or it is refused: z is checked against its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hosts import HOOKED_NAMES, build, prompt, shared
from torch import Tensor

from metaopt_lens import KnockOut, compare, decompose, finetune, head_effects, intervene, meta_gradient, wrap
from metaopt_lens._errors import MetaoptLensError, OptionError, UnsupportedModelError
from metaopt_lens.interventions import MomentumAttention
from metaopt_lens.models import Hook

FEW = ["bridge:gpt2", "bridge:llama", "bridge:gptj", "bridge:gpt_oss", *HOOKED_NAMES[:1]]
PROMPT = prompt()


class _OnZ:
    """A user's intervention that moves one head's output by a share of itself."""

    def __init__(self, layer: int, head: int, share: float) -> None:
        self.layer, self.head, self.share = layer, head, share

    def hooks(self, model: Any) -> list[Hook]:
        def move(z: Tensor) -> Tensor:
            moved = z.clone()
            moved[:, :, self.head] *= 1 + self.share
            return moved

        return [(model.hook_name("z", self.layer), move)]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in FEW), *((name, torch.float64) for name in FEW[:2])], ids=str
)
def test_a_hook_that_changes_z_is_refused_and_names_the_head(name: str, dtype: torch.dtype) -> None:
    model = shared(name, dtype)
    with (
        intervene(model, _OnZ(1, 2, 1e-3)),
        pytest.raises(UnsupportedModelError, match=r"output z of head L1H2 is not .* a hook changes z.*reset_hooks"),
    ):
        decompose(model, PROMPT)
    assert decompose(model, PROMPT).softmax.z.isfinite().all()


def test_in_bfloat16_rounding_passes_and_a_changed_head_does_not() -> None:
    model = build("bridge:gpt2", dtype=torch.bfloat16)
    decompose(model, PROMPT, position="all")
    with intervene(model, _OnZ(0, 1, 0.5)), pytest.raises(UnsupportedModelError, match="head L0H1"):
        decompose(model, PROMPT)


@pytest.mark.parametrize("name", HOOKED_NAMES[:1])
def test_a_hook_on_the_pattern_is_refused_where_the_matched_run_would_ignore_it(name: str) -> None:
    model = shared(name)
    wrapped = wrap(model)  # checked before the hook is there

    def even(pattern: Tensor, hook: Any) -> Tensor:
        visible = (pattern > 0).to(pattern.dtype)
        return visible / visible.sum(-1, keepdim=True)

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", even)]):
        with pytest.raises(UnsupportedModelError, match="of head L1H"):
            decompose(wrapped, PROMPT)
        found = decompose(wrapped, PROMPT, zero_shot_runs="none")  # the parts are those of the changed pattern
    torch.testing.assert_close(found.softmax.z, found.z, rtol=1e-5, atol=1e-6)


INSIDE: dict[str, Callable[[Any, Any], object]] = {
    "decompose": lambda model, _: decompose(model, PROMPT),
    "meta_gradient": lambda model, _: meta_gradient(model, PROMPT),
    "head_effects": lambda model, _: head_effects(model, [PROMPT], metric="loss"),
    "compare": lambda model, update: compare(model, [PROMPT, PROMPT], update, progress=False),
}


@pytest.mark.parametrize("what", INSIDE)
@pytest.mark.parametrize("name", ["bridge:gpt2", *HOOKED_NAMES[:1]])
def test_inside_an_applied_meta_gradient_demonstrations_would_count_twice(name: str, what: str) -> None:
    model = shared(name)
    mg, update = meta_gradient(model, PROMPT), finetune(model, PROMPT, lr=0.1, progress=False)
    for applied in (mg, mg.apply("linear", strength=0.5), mg.select(["L2H0"])):
        with (
            intervene(model, applied),
            pytest.raises(OptionError, match=rf"a meta-gradient is applied .* count twice.* Call {what} outside"),
        ):
            INSIDE[what](model, update)
    with intervene(model, KnockOut(PROMPT, ["L0H0"])), pytest.raises(OptionError, match="a knock-out is applied"):
        INSIDE[what](model, update)


def test_the_refusal_ends_with_the_block_also_after_an_error() -> None:
    model = shared("bridge:gpt2")
    mg = meta_gradient(model, PROMPT)
    with pytest.raises(KeyboardInterrupt), intervene(model, mg):
        raise KeyboardInterrupt
    decompose(model, PROMPT)


@pytest.mark.parametrize("name", ["bridge:llama", *HOOKED_NAMES[:1]])
def test_weight_updates_momentum_and_hooks_on_q_k_v_keep_working(name: str) -> None:
    """Parts of the changed model add up to its own z."""
    model = shared(name)
    update = finetune(model, PROMPT, lr=0.5, projections=("q", "k", "v"), progress=False)

    def double(tensor: Tensor) -> Tensor:
        return 2 * tensor

    wrapped = wrap(model)
    on_keys_and_values = [(wrapped.hook_name(kind, 1), double) for kind in "qkv"]
    plain = decompose(model, PROMPT)
    with intervene(model, update), wrapped.hooked(on_keys_and_values):
        changed = decompose(model, PROMPT)
    with intervene(model, MomentumAttention(0.5, ["L1H0", "L2H3"])), update.applied(model):
        moved = decompose(model, PROMPT)
    for found in (changed, moved):
        torch.testing.assert_close((found.softmax.z + found.momentum).view_as(found.z), found.z, rtol=0, atol=1e-5)
        assert float((found.z - plain.z).abs().max()) > 1e-3


def test_momentum_is_a_part_however_it_was_attached() -> None:
    """Its hooks say what they add: nothing needs to be announced."""
    model = shared("bridge:gpt2")
    wrapped = wrap(model)
    with wrapped.hooked(MomentumAttention(0.5, ["L2H1"]).hooks(wrapped)):
        found = decompose(model, PROMPT)
    assert float(found.momentum[2, 1].norm()) > 0
    torch.testing.assert_close(found.softmax.z + found.momentum, found.z, rtol=1e-5, atol=1e-6)


def test_what_is_no_intervention_is_refused() -> None:
    with (
        pytest.raises(MetaoptLensError, match=r"str is no intervention.*hooks\(model\)"),
        intervene(shared("bridge:gpt2"), "L0H0"),
    ):
        pass
