"""Knock-outs against scores at -inf in the host itself, and against what `decompose` predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hosts import (
    HOOKED_NAMES,
    HOST_NAMES,
    NATIVE_ATTENTION,
    host_z,
    left_as_it_was,
    mask_query_to_demos,
    prompt,
    shared,
    tokenized,
    transformers_z,
)
from rounding import PASS, STEP, assert_agree, of_pass
from torch import Tensor

from metaopt_lens import KnockOut, MetaoptLensError, decompose, intervene
from metaopt_lens.prompts import TokenizedPrompt

PROMPT = prompt()
# An expert computes its tokens together: where other tokens of Q come to it, those of D are rounded differently.
MIXTURES = {"bridge:gpt_oss", "bridge:mixtral"}
EDITABLE = [name for name in HOST_NAMES if name not in NATIVE_ATTENTION]


def run(model: Any, tokens: Sequence[int], *, edits: Any = ()) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(torch.tensor([list(tokens)]), fwd_hooks=list(edits))[0]


def hide(tokens: TokenizedPrompt, demo: int, n_layers: int) -> list[tuple[str, Callable[..., Any]]]:
    def edit(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[..., tokens.query.slice, tokens.demos[demo].slice] = -torch.inf
        return scores

    return [(f"blocks.{layer}.attn.hook_attn_scores", edit) for layer in range(n_layers)]


@pytest.mark.parametrize("name", EDITABLE)
def test_all_heads_equal_the_host_with_scores_at_minus_infinity(name: str) -> None:
    model = shared(name)
    tokens = tokenized(model, PROMPT)
    expected = run(model, tokens.ids, edits=mask_query_to_demos(model, tokens))
    with intervene(model, KnockOut(PROMPT)):
        found = run(model, tokens.ids)
    assert_agree(found, expected, of_pass(name))
    full = run(model, tokens.ids)
    assert (full[-1] - found[-1]).abs().max() > 1e-2
    before = slice(tokens.query.start)  # D itself is left alone
    if name in MIXTURES:
        assert_agree(found[before], full[before], PASS)
    else:
        assert torch.equal(found[before], full[before])


@pytest.mark.parametrize("name", sorted(NATIVE_ATTENTION))
def test_all_heads_where_bridges_discard_edits(name: str) -> None:
    model = shared(name)
    tokens = tokenized(model, PROMPT)
    with intervene(model, KnockOut(tokens)):
        found = host_z(model, tokens.ids)
    masked = transformers_z(name, tokens, hide_demos=True)
    assert_agree(found.flatten(2), masked, of_pass(name))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_all_heads_equal_the_position_matched_run_of_decompose(name: str) -> None:
    model = shared(name)
    result = decompose(model, PROMPT, position="all")
    with intervene(model, KnockOut(PROMPT)):
        found = host_z(model, result.tokenized.ids)[result.tokenized.query.slice]
    assert_agree(found, result.z_position_matched, of_pass(name))


@pytest.mark.parametrize("name", HOST_NAMES)
@pytest.mark.parametrize("head", [(0, 1), (1, 3), (2, 2)])
def test_one_head_gives_what_decompose_predicts(name: str, head: tuple[int, int]) -> None:
    model = shared(name)
    result = decompose(model, PROMPT, position="all", zero_shot_runs="none")
    layer, index = head
    with intervene(model, KnockOut(PROMPT, heads=[f"L{layer}H{index}"])):
        found = host_z(model, result.tokenized.ids)[result.tokenized.query.slice]
    predicted = result.softmax.without_demos[:, layer, index]
    assert_agree(found[:, layer, index], predicted, of_pass(name))
    others = [i for i in range(4) if i != index]
    assert_agree(found[:, layer, others], result.z[:, layer, others], of_pass(name))


@pytest.mark.parametrize("demo", [0, 2])
@pytest.mark.parametrize("name", EDITABLE)
def test_leave_one_demonstration_out(name: str, demo: int) -> None:
    model = shared(name)
    tokens = tokenized(model, PROMPT)
    expected = run(model, tokens.ids, edits=hide(tokens, demo, 3))
    with intervene(model, KnockOut(PROMPT, demos=[demo])):
        found = run(model, tokens.ids)
    assert_agree(found, expected, of_pass(name))


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:gemma2", *HOOKED_NAMES[:1]])
def test_positions(name: str) -> None:
    model = shared(name)
    tokens = tokenized(model, PROMPT)
    n = len(tokens.query)
    full = run(model, tokens.ids)
    with intervene(model, KnockOut(PROMPT, positions="last")):
        last = run(model, tokens.ids)
    assert torch.equal(last[:-1], full[:-1])
    with intervene(model, KnockOut(PROMPT, positions=[n - 1])):
        assert_agree(run(model, tokens.ids), last, STEP)
    with intervene(model, KnockOut(PROMPT)):
        query = run(model, tokens.ids)
    assert (query[-1] - last[-1]).abs().max() > 1e-3  # the last position alone is not the zero-shot run


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:bloom", *HOOKED_NAMES[:2]])
def test_padded_batch_and_generation(name: str) -> None:
    model = shared(name)
    short, long = tokenized(model, PROMPT), tokenized(model, prompt(query="w31 w90 w16 w60 :"))
    width = long.n_tokens
    tokens, mask = torch.zeros(2, 2, width, dtype=torch.long)
    for row, one in enumerate((short, long)):
        tokens[row, width - one.n_tokens :], mask[row, width - one.n_tokens :] = torch.tensor(one.ids), 1
    knock_out = KnockOut(PROMPT, layers=[1, 2])
    with intervene(model, knock_out), torch.no_grad():
        batch = model(tokens, attention_mask=mask)
        alone = [run(model, one.ids)[-1] for one in (short, long)]
        options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
        new = [
            model.generate(torch.tensor([long.ids]), use_past_kv_cache=c, return_type="tokens", **options)
            for c in (True, False)
        ]
    assert_agree(batch[:, -1], torch.stack(alone), PASS)
    assert torch.equal(*new)


def test_behind_a_shared_prefix() -> None:
    from metaopt_lens import meta_gradient, wrap

    model = shared("bridge:llama")
    mg, tokens = meta_gradient(model, PROMPT), tokenized(model, PROMPT)
    knock_out = KnockOut(mg, heads=["L1H0"], positions="last")
    with intervene(model, knock_out):
        expected = run(model, tokens.ids)[-1]
    found = mg.run(model, torch.tensor([tokens.ids[tokens.query.start :]]), hooks=knock_out.hooks(wrap(model)))
    assert found is not None
    assert_agree(found[0, -1], expected, PASS)


@pytest.mark.parametrize("name", ["bridge:gpt2", *HOOKED_NAMES[:1]])
def test_the_model_comes_back_as_it_was(name: str) -> None:
    model = shared(name)
    with left_as_it_was(model), intervene(model, KnockOut(PROMPT)):
        run(model, tokenized(model, PROMPT).ids)


def test_refusals() -> None:
    model = shared("bridge:gpt2")
    with pytest.raises(MetaoptLensError, match="no head L0H4"), intervene(model, KnockOut(PROMPT, heads="L0H4")):
        pass
    with pytest.raises(MetaoptLensError, match="selection is empty"), intervene(model, KnockOut(PROMPT, heads=[])):
        pass
    with pytest.raises(MetaoptLensError, match="no demonstration 7"), intervene(model, KnockOut(PROMPT, demos=[7])):
        pass
    with pytest.raises(MetaoptLensError, match="positions must be 'query', 'last' or token indices"):
        KnockOut(PROMPT, positions="first")
    with pytest.raises(MetaoptLensError, match="positions must be at least one index"):
        KnockOut(PROMPT, positions=[])
    with (
        intervene(model, KnockOut(PROMPT)),
        pytest.raises(MetaoptLensError, match="must begin with the demonstrations' prompt"),
    ):
        run(model, [1, 20, 21, 4, 16, 17, 3])
