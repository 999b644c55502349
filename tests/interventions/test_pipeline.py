"""Interventions of any author compose: by stage, whatever their order, in our context or in TransformerLens's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import (
    HOOKED_NAMES,
    HOST_NAMES,
    NATIVE_ATTENTION,
    POST_NORMED,
    left_as_it_was,
    mask_query_to_demos,
    prompt,
    shared,
    tokenized,
)
from rounding import PASS, assert_agree, of_pass
from torch import Tensor

from metaopt_lens import ICLPrompt, KnockOut, MetaoptLensError, intervene, meta_gradient, wrap
from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.interventions import Change, Memory, MomentumAttention, Sight, Visibility, fwd_hooks
from metaopt_lens.models import Hook, HostPass, Late, LensModel
from metaopt_lens.training import ShortConvolution

SOME = ["bridge:gpt2", "bridge:mistral", "bridge:bloom", "bridge:gpt_oss", *HOOKED_NAMES[1:4:2]]
EDITABLE = [name for name in SOME if name not in NATIVE_ATTENTION]
ETA = torch.tensor([[0.0, 0.3, 0.6, 0.9], [0.5, 0.5, 0.0, 0.99], [0.2, 0.7, 0.8, 0.1]])
EVERY_HEAD = torch.ones(3, 4, dtype=torch.bool)


def logits(model: Any, ids: Any, *interventions: Any) -> Tensor:
    tokens = torch.as_tensor([list(ids)])
    with torch.no_grad():
        if not interventions:
            return model(tokens)[0]
        with intervene(model, *interventions):
            return model(tokens)[0]


def update_of(model: Any, *, of_outputs: bool = True) -> WeightUpdate:
    info, draw = wrap(model).info, torch.Generator().manual_seed(3)
    kv = (info.n_layers, info.n_kv_heads, info.d_model, info.d_head)
    out = (info.n_layers, info.n_heads, info.d_head, info.d_model)
    w_k, w_v = (0.1 * torch.randn(kv, generator=draw) for _ in "kv")
    w_o = 0.05 * torch.randn(out, generator=draw) if of_outputs else None
    return WeightUpdate(info, w_k=w_k, w_v=w_v, w_o=w_o)


def halve(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 0.5


def push(tensor: Tensor, hook: Any) -> Tensor:
    return torch.cat([tensor[:, :-2], tensor[:, -2:] + 0.3], dim=1)


HOST_HOOKS = [("blocks.1.hook_resid_pre", push), ("blocks.2.attn.hook_z", halve), ("blocks.0.attn.hook_v", halve)]


# ---- a user's own -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HideToken:
    """Nobody after a token sees it."""

    index: int
    heads: Any = EVERY_HEAD

    def change(self, model: LensModel) -> Change:
        def hidden(host_pass: HostPass) -> Tensor:
            slots = (host_pass.index == self.index) & host_pass.valid
            return (host_pass.index[:, host_pass.n_past :] > self.index)[:, :, None] & slots[:, None]

        return Change(visibility=Visibility("a hidden token", self.heads, hidden=hidden))


@dataclass(frozen=True)
class MeanOfSeen:
    """Adds the mean of the values that a head sees."""

    def change(self, model: LensModel) -> Change:
        def add(model: LensModel, sight: Sight) -> list[Hook]:
            return [hook for layer in range(model.info.n_layers) for hook in _mean_of_seen(model, sight, layer)]

        return Change(addition=add)


def _mean_of_seen(model: LensModel, sight: Sight, layer: int) -> list[Hook]:
    kept: list[Tensor] = []

    def add(z: Tensor) -> Tensor:
        seen = sight.sources(layer, kept.pop())
        return z + seen.weighted(1 / seen.share.sum(-1, keepdim=True).expand_as(seen.share))

    return [(model.hook_name("v", layer), Late(kept.append)), (model.hook_name("z", layer), add)]


@pytest.mark.parametrize("name", EDITABLE)
def test_a_users_visibility_is_the_hosts_own_mask(name: str) -> None:
    model = shared(name)
    ids = tokenized(model, prompt()).ids
    some = torch.zeros(3, 4, dtype=torch.bool)
    some[0, 1] = some[2, 3] = True

    def hide(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[:, some[int(hook.name.split(".")[1])], 6:, 5] = -torch.inf
        return scores

    edits = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(3)]
    with torch.no_grad():
        expected = model.run_with_hooks(torch.tensor([list(ids)]), fwd_hooks=edits)[0]
    found = logits(model, ids, HideToken(5, some))
    assert_agree(found, expected, of_pass(name))
    assert (found - logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", EDITABLE)
def test_a_users_addition_is_told_what_knock_outs_hide(name: str) -> None:
    model = shared(name)
    tokens = tokenized(model, prompt())
    n = tokens.n_tokens
    seen = torch.ones(n, n).tril()
    seen[tokens.query.slice, tokens.demonstrations.slice] = 0
    hooks = mask_query_to_demos(model, tokens)
    for layer in range(3):
        kept: list[Tensor] = []

        def keep(v: Tensor, hook: Any, kept: list[Tensor] = kept) -> None:
            kept.append(v)

        def add(z: Tensor, hook: Any, kept: list[Tensor] = kept) -> Tensor:
            v = kept.pop()
            mean = torch.einsum("ts,bshd->bthd", seen / seen.sum(-1, keepdim=True), v)
            return z + mean.repeat_interleave(4 // v.shape[2], dim=2)

        hooks += [(f"blocks.{layer}.attn.hook_v", keep), (f"blocks.{layer}.attn.hook_z", add)]
    with torch.no_grad():
        expected = model.run_with_hooks(torch.tensor([list(tokens.ids)]), fwd_hooks=hooks)[0]
    for order in permutations([MeanOfSeen(), KnockOut(prompt())]):
        assert_agree(logits(model, tokens.ids, *order), expected, of_pass(name))


@pytest.mark.parametrize("name", SOME)
def test_a_users_memory_is_what_a_meta_gradient_is_made_of(name: str) -> None:
    """Other keys and values may be seen as well: here those of a meta-gradient, by a class that is not ours."""
    model, mg = shared(name), meta_gradient(shared(name), prompt())
    zero_shot = tokenized(model, prompt()).zero_shot().ids
    start, stop = mg.tokens.start, mg.tokens.stop

    class Remembers:
        def change(self, model: LensModel) -> Change:
            memory = Memory(mg.k[:, start:], mg.v[:, start:], torch.arange(start, stop))

            def place(host_pass: HostPass) -> Tensor:
                return host_pass.index + (host_pass.index >= start) * (stop - start)

            return Change(visibility=Visibility("a memory", EVERY_HEAD, place=place, memory=memory))

    assert torch.equal(logits(model, zero_shot, Remembers()), logits(model, zero_shot, mg))


# ---- composition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_a_meta_gradient_with_hooks_is_the_in_context_run_with_these_hooks(name: str) -> None:
    """Also at z: hooks see what the heads put out in the end. (In 0.1 the merge came after them.)"""
    model = shared(name)
    tokens = tokenized(model, prompt())
    with intervene(model, HOST_HOOKS[2:]):  # values of D are changed too
        mg = meta_gradient(model, prompt())
    with torch.no_grad():
        expected = model.run_with_hooks(torch.tensor([list(tokens.ids)]), fwd_hooks=HOST_HOOKS)[0, -1]
    for order in ((mg, HOST_HOOKS), (HOST_HOOKS, mg)):
        assert_agree(logits(model, tokens.zero_shot().ids, *order)[-1], expected, PASS)
    assert_agree(logits(model, tokens.ids, HOST_HOOKS)[-1], expected, 0)


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:bloom", *HOOKED_NAMES[:1]])
def test_the_order_of_the_arguments_does_not_matter(name: str) -> None:
    model = shared(name)
    mg = meta_gradient(model, prompt())
    ids = tokenized(model, prompt()).zero_shot().ids
    given = (update_of(model), mg, MomentumAttention(ETA), HideToken(5), HOST_HOOKS[:2])
    found = [logits(model, ids, *order) for order in permutations(given)]
    assert all(torch.equal(one, found[0]) for one in found)
    for index in range(len(given)):  # each does something
        without = logits(model, ids, *given[:index], *given[index + 1 :])
        assert (without - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", EDITABLE)
def test_two_knock_outs_of_one_head_hide_what_either_hides(name: str) -> None:
    """In 0.1 the second undid the first."""
    model = shared(name)
    ids = tokenized(model, prompt()).ids
    both = logits(model, ids, KnockOut(prompt(), demos=[0, 2]))
    for order in permutations([KnockOut(prompt(), demos=[0]), KnockOut(prompt(), demos=[2])]):
        assert_agree(logits(model, ids, *order), both, PASS)
    with_momentum = logits(model, ids, KnockOut(prompt(), demos=[0, 2]), MomentumAttention(ETA))
    apart = [KnockOut(prompt(), demos=[0]), MomentumAttention(ETA), KnockOut(prompt(), demos=[2])]
    assert_agree(logits(model, ids, *apart), with_momentum, PASS)


@pytest.mark.parametrize("name", EDITABLE)
def test_a_meta_gradient_of_some_demonstrations_with_others_in_the_prompt_knocked_out(name: str) -> None:
    model = shared(name)
    whole = prompt()
    first = ICLPrompt(whole.demos[:2], whole.query, whole.template, whole.instruction)
    last = ICLPrompt(whole.demos[2:], whole.query, whole.template, whole.instruction)
    mg = meta_gradient(model, first)
    expected = logits(model, tokenized(model, whole).ids, KnockOut(whole, demos=[2, 3]))[-1]
    for order in permutations([mg, KnockOut(last)]):
        assert_agree(logits(model, tokenized(model, last).ids, *order)[-1], expected, PASS)
    expected = logits(model, tokenized(model, whole).ids, KnockOut(whole, demos=[2, 3]), MomentumAttention(ETA))[-1]
    with intervene(model, MomentumAttention(ETA)):
        mg = meta_gradient(model, first)
    found = logits(model, tokenized(model, last).ids, KnockOut(last), MomentumAttention(ETA), mg)[-1]
    assert_agree(found, expected, PASS)


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", *HOOKED_NAMES[:1]])
def test_the_short_convolution_sees_what_momentum_sees(name: str) -> None:
    model = shared(name)
    mg, tokens = meta_gradient(model, prompt()), tokenized(model, prompt())
    for seen, ids in ((KnockOut(prompt(), ["L0H1", "L1H3"]), tokens.ids), (mg, tokens.zero_shot().ids)):
        long = logits(model, ids, ShortConvolution(ETA, lags=100), seen)
        assert_agree(long, logits(model, ids, seen, MomentumAttention(ETA)), PASS)
        assert (long - logits(model, ids, ShortConvolution(ETA, lags=2), seen)).abs().max() > 1e-3


def test_what_is_added_under_visibility_that_is_on_already_is_refused() -> None:
    model = shared("bridge:gpt2")
    for outer, name in ((KnockOut(prompt()), "a knock-out"), (meta_gradient(model, prompt()), "a meta-gradient")):
        with (
            left_as_it_was(model),
            pytest.raises(OptionError, match=rf"{name} is applied .* already.* give both to the same intervene"),
            intervene(model, outer),
            intervene(model, MomentumAttention(0.5)),
        ):
            pass


def test_hooks_at_points_that_are_not_there_are_refused() -> None:
    with (
        pytest.raises(UnsupportedModelError, match=r"no hook point 'blocks\.1\.attn\.hook_zz'"),
        intervene(shared("bridge:gpt2"), [("blocks.1.attn.hook_zz", halve)]),
    ):
        pass
    for given in ([push], [("hook", 3)], {"hook": push}):
        with pytest.raises(MetaoptLensError, match=r"is no intervention.*TransformerLens hooks \[\(name, function\)\]"):  # noqa: SIM117
            with intervene(shared("bridge:gpt2"), given):
                pass


# ---- TransformerLens's own calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOST_NAMES)
def test_run_with_hooks_is_what_intervene_is(name: str) -> None:
    model = shared(name)
    update = update_of(model, of_outputs=name not in POST_NORMED)
    knock_out, momentum = KnockOut(prompt(), layers=[0, 2]), MomentumAttention(ETA)
    ids = tokenized(model, prompt()).ids
    tokens = torch.tensor([list(ids), list(ids)])
    with left_as_it_was(model):
        for given in ((update,), (HOST_HOOKS, update), (knock_out,), (momentum, update, knock_out, HOST_HOOKS)):
            needs = None if len(given) < 3 and knock_out not in given else tokens
            hooks = fwd_hooks(model, *given, tokens=needs)
            with torch.no_grad():
                found = model.run_with_hooks(tokens, fwd_hooks=hooks)
                assert torch.equal(found, model.run_with_hooks(tokens, fwd_hooks=hooks))  # they can be used again
                with intervene(model, *given):
                    assert torch.equal(found, model(tokens))
                assert (found - model(tokens)).abs().max() > 1e-3


def test_hooks_that_cannot_be_handed_over_say_why() -> None:
    model = shared("bridge:gpt2")
    mg, ids = meta_gradient(model, prompt()), torch.tensor([list(tokenized(model, prompt()).ids)])
    for given in (KnockOut(prompt()), MomentumAttention(0.5), mg):
        with pytest.raises(OptionError, match=r"acts by position.*give fwd_hooks the tokens=.*with intervene\(model"):
            fwd_hooks(model, given)
    zero_shot = torch.tensor([list(tokenized(model, prompt()).zero_shot().ids)])
    with pytest.raises(OptionError, match=r"moves tokens to other positions, which no hook can.*with intervene"):
        fwd_hooks(model, mg, tokens=zero_shot)
    with pytest.raises(MetaoptLensError, match="must begin with the demonstrations' prompt"):
        fwd_hooks(model, KnockOut(prompt()), tokens=zero_shot)
    hooks = fwd_hooks(model, KnockOut(prompt()), tokens=ids)
    with pytest.raises(OptionError, match=r"for one pass over tokens of shape \[1, \d+\], this one has \[1, 3\]"):
        model.run_with_hooks(ids[:, :3], fwd_hooks=hooks)
    with pytest.raises(OptionError, match="needs at least one intervention"):
        fwd_hooks(model)


# ---- the page ---------------------------------------------------------------------------------------------------


def test_the_code_on_the_page_runs_and_its_claims_hold() -> None:
    page = (Path(__file__).parents[2] / "docs/interventions.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "interventions.md", "exec"), names)
    model, ids = names["model"], names["in_context"]
    assert_agree(names["merged"][0, -1], names["full"][0, -1], PASS)
    with intervene(model, KnockOut(names["prompt"], demos=[0]), MomentumAttention(0.1)), torch.no_grad():
        hidden_from_query = model(ids)
    assert (names["without"] - hidden_from_query)[0, 5:].abs().max() > 1e-3  # the page hides it from later ones too
    with torch.no_grad():
        assert (names["logits"] - model(ids)).abs().max() > 1e-3
        assert (names["answered"] - model(names["zero_shot"])).abs().max() > 1e-3
