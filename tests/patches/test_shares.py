"""Shares of heads, demonstrations and tokens: they sum to the whole, and say what hiding one demonstration does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hosts import HOST_NAMES, prompt, requires_hooked
from test_exact_patch import FLOAT32_INSIDE, precise

from metaopt_lens import WeightPatch, compile_context
from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.patches import ContextShares, context_shares, leave_one_out

PROMPT = prompt(4)
NORMED = {"bridge:gemma2", "bridge:gemma3", "bridge:olmo2"}
UNREADABLE = {"hooked:window_softcap"}
# Bridges whose softmax is in float32 whatever the dtype: the heads' outputs without D are rounded so.
_SOFTMAX = [
    "opt",
    "llama",
    "llama_mqa",
    "mistral",
    "qwen2",
    "qwen3",
    "stablelm",
    "phi",
    "bloom",
    "gemma",
    "mixtral",
    "falcon",
]
COARSE = FLOAT32_INSIDE | {f"bridge:{family}" for family in _SOFTMAX}


@cache
def shared_out(name: str) -> tuple[Any, WeightPatch, ContextShares]:
    model = precise(name)
    patch = compile_context(model, PROMPT)
    return model, patch, context_shares(model, patch)


def host_pattern(model: Any, patch: WeightPatch, layer: int) -> torch.Tensor:
    """Attention of the query's tokens, ``[head, dst, src]``, from the host's own cache."""
    with torch.no_grad():
        _, held = model.run_with_cache(torch.tensor([patch.tokens.ids]))
    return held[f"blocks.{layer}.attn.hook_pattern"][0, :, -len(patch.query_ids) :].double()


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name not in UNREADABLE])
def test_shares_sum_to_the_whole(name: str) -> None:
    _, patch, shares = shared_out(name)
    assert shares.norm_scale_fixed == (name in NORMED)
    tolerance = 1e-5 if name in COARSE else 1e-10
    # Sums over heads, over demonstrations, and of components along u agree, whatever the norm.
    torch.testing.assert_close(shares.by_head.sum(2), shares.by_demo.sum(2), rtol=0, atol=1e-12)
    along = (shares.by_head.sum(2) * shares.u).sum(-1) / shares.u.square().sum(-1)
    torch.testing.assert_close(shares.by_token.sum((-2, -1)), along, rtol=0, atol=1e-10)
    torch.testing.assert_close(shares.of_demos.sum(-1), shares.by_token.sum(-1), rtol=0, atol=1e-12)
    heads = (shares.by_head * shares.u[:, :, None]).sum(-1) / shares.u.square().sum(-1, keepdim=True)
    torch.testing.assert_close(shares.by_token.sum(-1), heads, rtol=0, atol=1e-10)
    if name in NORMED:
        assert shares.remainder.abs().max() > 1e-3
    else:
        torch.testing.assert_close(shares.by_head.sum(2), patch.u, rtol=0, atol=tolerance)
        torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=tolerance * 100)


def test_with_a_norm_behind_attention_its_scale_is_that_in_context() -> None:
    model, patch, shares = shared_out("bridge:olmo2")
    layer = model.original_model.model.layers[1]
    with torch.no_grad():
        _, held = model.run_with_cache(torch.tensor([patch.tokens.ids]))
    out = held["blocks.1.attn.hook_out"][0, -3:]
    norm = layer.post_attention_layernorm
    scale = norm.weight / (out.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    demos = patch.tokens.demonstrations.slice
    pattern = host_pattern(model, patch, 1)
    inside, z = pattern[..., demos].sum(-1), held["blocks.1.attn.hook_z"][0, -3:].reshape(3, 4, 8)
    v = held["blocks.1.attn.hook_v"][0].reshape(-1, 2, 8).repeat_interleave(2, dim=1)
    read = torch.einsum("hti,ihd->thd", pattern[..., demos], v[demos])
    without = (z - read) / (1 - inside.mT)[..., None]
    expected = torch.einsum("thd,hdm->tm", z - without, model.blocks[1].attn.W_O) * scale
    torch.testing.assert_close(shares.by_head[1].sum(1), expected.detach(), rtol=0, atol=1e-5)


@requires_hooked
def test_where_the_attention_output_cannot_be_read_it_is_said() -> None:
    model = precise("hooked:window_softcap")
    with pytest.raises(UnsupportedModelError, match="normalises the attention output before the hook"):
        context_shares(model, compile_context(model, PROMPT))


def test_leaving_a_share_out_is_hiding_the_demonstration_to_first_order() -> None:
    """In the first layer exactly so, head by head, but for the attention that the others then get."""
    model, patch, shares = shared_out("bridge:llama")
    left_out = leave_one_out(model, PROMPT, shares)
    assert left_out.difference.shape == (4, 3, 3)
    pattern = host_pattern(model, patch, 0)
    with torch.no_grad():
        _, held = model.run_with_cache(torch.tensor([patch.tokens.ids]))
    v = held["blocks.0.attn.hook_v"][0].reshape(-1, 2, 8).repeat_interleave(2, dim=1)
    w_o = model.blocks[0].attn.W_O.detach()
    for number, span in enumerate(patch.tokens.demos):
        hidden = pattern[..., span.slice].sum(-1).mT  # dst head
        # u less the share, head by head, from the pattern alone
        demos = torch.zeros(pattern.shape[-1], dtype=torch.bool)
        demos[patch.tokens.demonstrations.slice] = True
        others = demos.clone()
        others[span.slice] = False
        mass = pattern[..., demos].sum(-1).mT[..., None]
        without = torch.einsum("hti,ihd->thd", pattern[..., ~demos], v[~demos]) / (1 - mass)
        kept = torch.einsum(
            "hti,thid->thd", pattern[..., others], v[others].transpose(0, 1)[None] - without[:, :, None]
        )
        torch.testing.assert_close(
            torch.einsum("thd,hdm->tm", kept, w_o), left_out.without_share[number, 0], rtol=0, atol=1e-5
        )
        rescaled = torch.einsum("thd,hdm->tm", kept / (1 - hidden)[..., None], w_o)
        torch.testing.assert_close(rescaled, left_out.masked[number, 0], rtol=0, atol=1e-5)
        allowed = float((hidden / (1 - hidden)).max()) * float((kept.abs().sum((-2, -1))).max())
        assert float((left_out.without_share - left_out.masked)[number, 0].abs().max()) <= allowed


def test_tables_and_files(tmp_path: Any) -> None:
    _, patch, shares = shared_out("bridge:llama")
    frame = shares.to_frame()
    assert len(frame) == 3 * 3 * 4 * 4
    assert set(frame["position"]) == set(patch.positions)
    assert frame.groupby(["layer", "position"])["share"].sum().to_numpy() == pytest.approx(1.0)
    again = ContextShares.load(shares.save(tmp_path / "shares"))
    assert torch.equal(again.by_demo, shares.by_demo)
    assert repr(again) == "ContextShares of " + shares.model.name + ": 4 heads, 4 demonstrations"
    assert "the scale of the norm behind attention fixed" in repr(shared_out("bridge:gemma3")[2])
