"""Total, direct, indirect and position effect, against zero-shot runs made by the host itself."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hosts import (
    HOOKED_NAMES,
    HOST_NAMES,
    NATIVE_ATTENTION,
    host_z,
    mask_query_to_demos,
    prompt,
    shared,
    tokenized,
    transformers_z,
)
from rounding import PASS, STEP, SUM, assert_agree, of_pass, rounding

from metaopt_lens import Decomposition, MetaoptLensError, decompose

PROMPT = prompt()
EDITABLE = [name for name in HOST_NAMES if name not in NATIVE_ATTENTION]


@cache
def split(name: str, dtype: torch.dtype = torch.float32) -> Decomposition:
    return decompose(shared(name, dtype), PROMPT, position="all")


@pytest.mark.parametrize("name", HOST_NAMES)
def test_zero_shot_z_is_the_hosts_own_plain_zero_shot_run(name: str) -> None:
    result = split(name)
    zero_shot = result.tokenized.zero_shot()
    z = host_z(shared(name), zero_shot.ids)[zero_shot.query.slice]
    assert_agree(result.z_zero_shot, z, of_pass(name))


@pytest.mark.parametrize("name", EDITABLE)
def test_position_matched_z_is_the_host_with_scores_from_query_to_demos_masked(name: str) -> None:
    model, result = shared(name), split(name)
    tokens = result.tokenized
    masked = host_z(model, tokens.ids, edits=mask_query_to_demos(model, tokens))[tokens.query.slice]
    assert_agree(result.z_position_matched, masked, of_pass(name))
    assert (masked - result.z).abs().max() > 0.1  # the oracle's edit took effect
    plain = result.z_zero_shot
    assert plain is not None
    if name not in {"hooked:attn_only", "hooked:no_norm"}:  # asserted where position surely matters
        assert (masked - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(NATIVE_ATTENTION))
def test_position_matched_z_where_bridges_discard_edits(name: str) -> None:
    """The oracle here is the model without its bridge, on a 4D attention mask that hides D from Q."""
    result = split(name)
    tokens = result.tokenized
    masked = transformers_z(name, tokens, hide_demos=True)[tokens.query.slice]
    assert_agree(result.z_position_matched.flatten(2), masked, of_pass(name))  # type: ignore[union-attr]
    assert (masked - result.z.flatten(2)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "olmo2", "phi", "gpt_neox"])
def test_transformers_itself_agrees_on_both_runs(family: str) -> None:
    """No TransformerLens in the oracle: bridge and hooks cannot share a mistake with it."""
    result = split(f"bridge:{family}")
    tokens = result.tokenized
    for hide, ours in ((False, result.z), (True, result.z_position_matched)):
        theirs = transformers_z(f"bridge:{family}", tokens, hide_demos=hide)[tokens.query.slice]
        assert ours is not None
        assert_agree(ours.flatten(2), theirs, PASS)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_direct_indirect_and_position_sum_to_the_total(name: str) -> None:
    result = split(name)
    effects = result.effects
    assert effects.indirect is not None
    assert effects.position is not None
    total = result.z - result.z_zero_shot
    runs = (result.z, result.z_zero_shot, result.z_position_matched)
    assert_agree(effects.total, total, STEP, of=runs)
    summed = effects.direct + effects.indirect + effects.position
    assert_agree(summed, total, SUM, of=runs)
    assert_agree(effects.indirect + effects.position, effects.indirect_and_position, SUM, of=runs)
    assert_agree(effects.direct, result.softmax.update, SUM, of=runs)
    assert effects.indirect[:, 0].abs().max() <= rounding(
        of_pass(name), *runs
    )  # nothing has been read yet before the first layer
    assert effects.indirect[:, 1:].abs().max() > 1e-2


# The other bridges drop to float32 inside transformers (norms, softmax, rotary tables) whatever the dtype.
DOUBLE = ["bridge:gpt2", "bridge:gpt_bigcode", "bridge:gpt_neox", *HOOKED_NAMES]


@pytest.mark.parametrize("name", DOUBLE)
def test_effects_in_float64(name: str) -> None:
    model, result = shared(name, torch.float64), split(name, torch.float64)
    tokens = result.tokenized
    masked = host_z(model, tokens.ids, edits=mask_query_to_demos(model, tokens))[tokens.query.slice]
    torch.testing.assert_close(result.z_position_matched, masked, rtol=0, atol=1e-12)
    effects = result.effects
    assert effects.indirect is not None
    assert effects.indirect[:, 0].abs().max() < 1e-12


def test_plain_runs_only_give_indirect_and_position_as_one() -> None:
    model = shared("bridge:gpt2")
    both = decompose(model, PROMPT).effects
    plain = decompose(model, PROMPT, zero_shot_runs="plain").effects
    assert plain.indirect is None
    assert plain.position is None
    assert_agree(plain.total, both.total, PASS)
    assert_agree(plain.direct, both.direct, PASS)
    assert_agree(plain.indirect_and_position, both.indirect_and_position, PASS)


def test_without_zero_shot_runs_effects_are_refused_and_the_split_is_the_same() -> None:
    model = shared("bridge:gpt2")
    none = decompose(model, PROMPT, zero_shot_runs="none")
    with pytest.raises(MetaoptLensError, match=r"no zero-shot run was made.*zero_shot_runs='both'"):
        _ = none.effects
    assert_agree(none.softmax.meta_gradient, decompose(model, PROMPT).softmax.meta_gradient, PASS)


def test_no_token_before_the_demonstrations() -> None:
    """Without BOS and instruction S is empty, and the zero-shot run has no prefix."""
    model, text = shared("bridge:gpt2"), prompt(instruction=None)
    result = decompose(model, text, prepend_bos=False, position="all")
    assert len(result.tokenized.prefix) == 0
    zero_shot = result.tokenized.zero_shot()
    z = host_z(model, zero_shot.ids)[zero_shot.query.slice]
    assert_agree(result.z_zero_shot, z, PASS)
    masked = host_z(model, result.tokenized.ids, edits=mask_query_to_demos(model, result.tokenized))
    assert_agree(result.z_position_matched, masked[result.tokenized.query.slice], PASS)


def test_host_oracle_itself() -> None:
    """The edit hides exactly D from exactly Q: positions before Q do not move."""
    model = shared("bridge:llama")
    tokens = tokenized(model, PROMPT)
    z = host_z(model, tokens.ids)
    masked = host_z(model, tokens.ids, edits=mask_query_to_demos(model, tokens))
    assert torch.equal(z[: tokens.query.start], masked[: tokens.query.start])
