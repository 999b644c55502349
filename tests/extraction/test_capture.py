"""Captures: the shared prefix, ragged queries, chosen destinations, edits of z."""

from __future__ import annotations

import pytest
import torch
from families import bridge_of
from hosts import HOOKED_NAMES, build_hf, host_values, host_z, shared
from rounding import PASS, STEP, SUM, assert_agree
from torch import Tensor

from metaopt_lens import wrap
from metaopt_lens._errors import NonFiniteError
from metaopt_lens.extraction import capture_queries, run_shared_prefix
from metaopt_lens.models import AttentionCall

PREFIX = [1, 30, 31, 3, 32, 4]
QUERIES = [[16, 17, 3], [18, 3], [19, 20, 21, 22, 3]]
ROWS = [[2], [0, 1], [4, 1]]
FEW = ["bridge:gpt2", "bridge:gemma2", "bridge:gptj", "bridge:gpt_oss", "bridge:bloom", *HOOKED_NAMES[:4]]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("with_prefix", [True, False])
def test_captures_are_the_hosts_own_values(name: str, with_prefix: bool) -> None:
    model = shared(name)
    wrapped = wrap(model)
    before = PREFIX if with_prefix else []
    prefix = run_shared_prefix(wrapped, before)
    assert (prefix is None) is not with_prefix
    captures = capture_queries(wrapped, prefix, QUERIES, ROWS)
    for query, rows, capture in zip(QUERIES, ROWS, captures, strict=True):
        ids = before + query
        at = [len(before) + r for r in rows]
        assert_agree(capture.z, host_z(model, ids)[at], PASS)
        pattern = torch.stack(host_values(model, ids, "attn.hook_pattern"))[:, :, at]  # layer head dst src
        assert_agree(capture.pattern, pattern.permute(2, 0, 1, 3), PASS)
        assert_agree(capture.pattern.sum(-1) + capture.sink, torch.ones(len(at), 3, 4), SUM)
        assert capture.k.shape == capture.v.shape == (3, len(query), wrapped.info.n_kv_heads, 8)


def test_the_shared_prefix_is_what_run_prefix_gives_and_nothing_for_nothing() -> None:
    wrapped = wrap(shared("bridge:llama"))
    assert run_shared_prefix(wrapped, []) is None
    prefix = run_shared_prefix(wrapped, PREFIX)
    assert prefix is not None
    assert prefix.n_tokens == len(PREFIX)
    short = prefix.truncate(2)
    assert short is not None
    direct = run_shared_prefix(wrapped, PREFIX[:2])
    assert direct is not None
    for layer in range(3):
        assert_agree(short.k[layer], direct.k[layer], PASS)
        assert_agree(short.v[layer], direct.v[layer], PASS)
    assert prefix.truncate(0) is None


@pytest.mark.parametrize("name", FEW)
def test_an_edit_replaces_z_in_the_pass_and_in_the_capture(name: str) -> None:
    """Head 1 of layer 0 knocked out: its z is zero, later layers see it, and the host's own edit says the same."""
    model = shared(name)
    wrapped = wrap(model)

    def knock_out(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, 1] = 0.0
        return z

    def edit(call: AttentionCall) -> Tensor | None:
        return knock_out(call.z) if call.layer == 0 else None

    prefix = run_shared_prefix(wrapped, PREFIX)
    edited = capture_queries(wrapped, prefix, QUERIES[:1], [[0, 1, 2]], edit=edit)[0]
    plain = capture_queries(wrapped, prefix, QUERIES[:1], [[0, 1, 2]])[0]
    assert not edited.z[:, 0, 1].any()
    assert_agree(edited.z[:, 0, [0, 2, 3]], plain.z[:, 0, [0, 2, 3]], STEP)
    assert (edited.z[:, 1] - plain.z[:, 1]).abs().max() > 1e-4

    def own(z: Tensor, hook: object) -> Tensor:
        z = z.clone()
        z[:, len(PREFIX) :, 1] = 0.0
        return z

    ids = PREFIX + QUERIES[0]
    oracle = host_z(model, ids, edits=[("blocks.0.attn.hook_z", own)])[len(PREFIX) :]
    assert_agree(edited.z[:, 1:], oracle[:, 1:], PASS)


def test_captures_hold_no_more_than_their_own_tensors() -> None:
    """A capture must not keep a whole batch's tensors alive through a view."""
    wrapped = wrap(shared("bridge:gpt2"))
    prefix = run_shared_prefix(wrapped, PREFIX)
    for capture in capture_queries(wrapped, prefix, QUERIES, ROWS):
        for field in ("q", "pattern", "sink", "z", "k", "v"):
            tensor = getattr(capture, field)
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), field
            assert not tensor.requires_grad


def test_nan_in_the_prefix_names_the_first_layer() -> None:
    hf_model = build_hf("llama")
    model = bridge_of(hf_model)
    wrapped = wrap(model)
    with torch.no_grad():
        model.blocks[1].attn.k.original_component.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"the keys of layer 1 hold NaN or infinity.*load the model in float32"):
        run_shared_prefix(wrapped, PREFIX)
    with pytest.raises(NonFiniteError, match=r"layer 1 hold NaN"):
        capture_queries(wrapped, None, QUERIES, ROWS)
