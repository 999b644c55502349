"""The implicit MLP update: the block on the query alone outputs what it outputs in context."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hosts import HOOKED_NAMES, HOST_NAMES, host_values, left_as_it_was, prompt, shared
from rounding import PASS, SUM, assert_agree, of_pass, rounding
from torch import Tensor

from metaopt_lens import MetaoptLensError, intervene
from metaopt_lens.dual import implicit_weight_update
from metaopt_lens.interventions import ImplicitUpdate
from metaopt_lens.interventions import implicit_update as make
from metaopt_lens.models.tiny import load_tiny

REFUSED = {
    "bridge:phi": "attention and MLP run in parallel",
    "bridge:gpt_neox": "attention and MLP run in parallel",
    "bridge:falcon": "attention and MLP run in parallel",
    "bridge:gptj": "attention and MLP run in parallel",
    "bridge:gpt_oss": "the MLP is a mixture of experts",
    "bridge:mixtral": "the MLP is a mixture of experts",
    "bridge:olmo2": "the MLP's output is normalised",
    "bridge:gemma2": "the MLP's output is normalised",
    "bridge:gemma3": "the MLP's output is normalised",
    "hooked:partial_rotary_parallel": "attention and MLP run in parallel",
    "hooked:attn_only": "it is attention-only",
    "hooked:window_softcap": "the MLP's output is normalised",
}
WORKING = [name for name in HOST_NAMES if name not in REFUSED]
GATED = {"llama", "llama_mqa", "mistral", "qwen2", "qwen3", "stablelm", "gemma", "rotary"}


@cache
def made(name: str) -> ImplicitUpdate:
    return make(shared(name), prompt())


def outputs(model: Any, ids: tuple[int, ...]) -> list[Tensor]:
    return [residual[-1] for residual in host_values(model, ids, "hook_resid_post")]


@pytest.mark.parametrize("name", WORKING)
def test_block_without_context_outputs_what_it_outputs_in_context(name: str) -> None:
    model, update = shared(name), made(name)
    zero_shot = update.tokenized.zero_shot().ids
    expected, plain = outputs(model, update.tokenized.ids), outputs(model, zero_shot)
    for layer in range(3):
        with intervene(model, update.at(layer)):
            found = outputs(model, zero_shot)
        assert_agree(found[layer], expected[layer], of_pass(name))
        assert_agree(update.output[layer], expected[layer], of_pass(name))
        assert (plain[layer] - expected[layer]).abs().max() > 1e-2
        if layer:
            assert torch.equal(found[layer - 1], plain[layer - 1])  # the blocks below are left alone
    assert (update.left_gate is not None) == (name.split(":")[1] in GATED)


@pytest.mark.parametrize("backend", ["bridge", *(["hooked"] if HOOKED_NAMES else [])])
def test_the_bundled_model(backend: str) -> None:
    model = load_tiny(backend)
    update = make(model, "apple : dax\nhammer : wug\npear : dax\nsaw : wug\ncherry :")
    zero_shot = update.tokenized.zero_shot().ids
    expected = outputs(model, update.tokenized.ids)
    for layer in range(update.model.n_layers):
        with left_as_it_was(model), intervene(model, update.at(layer)):
            found = outputs(model, zero_shot)
        assert_agree(found[layer], expected[layer], PASS)
    # The last block's output is the answer's.
    last = update.model.n_layers - 1
    with intervene(model, update.at(last)), torch.no_grad():
        answer = model(torch.tensor([zero_shot]))[0, -1]
    with torch.no_grad():
        in_context = model(torch.tensor([update.tokenized.ids]))[0, -1]
    assert_agree(answer, in_context, PASS)
    assert model.tokenizer.decode([int(answer.argmax())]).strip() == "dax"


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(HOST_NAMES)))
def test_refused_by_name(name: str) -> None:
    with pytest.raises(MetaoptLensError, match=f"implicit weight update of .* is not defined: {REFUSED[name]}"):
        make(shared(name), prompt())


def test_a_parallel_architecture_run_in_sequence_is_fine() -> None:
    from hosts import build

    model = build("bridge:gpt_neox", use_parallel_residual=False)
    update = make(model, prompt())
    with intervene(model, update.at(1)):
        found = outputs(model, update.tokenized.zero_shot().ids)
    assert_agree(found[1], outputs(model, update.tokenized.ids)[1], PASS)


def test_matrices_and_norms() -> None:
    update = made("bridge:llama")
    for matrix in ("in", "gate"):
        delta = update.delta(1, matrix).AB
        assert int(torch.linalg.matrix_rank(delta)) == 1
        assert_agree(delta.norm(), update.norms(matrix)[1], SUM)
    frame = update.to_frame()
    assert list(frame.columns) == [
        "layer",
        "dw_in_norm",
        "dw_in_relative",
        "dw_gate_norm",
        "dw_gate_relative",
        "db_norm",
    ]
    weight = shared("bridge:llama").original_model.model.layers[2].mlp.up_proj.weight.detach()
    w_in = update.norms()[2] / weight.norm()
    assert frame["dw_in_relative"][2] == pytest.approx(float(w_in), rel=rounding(SUM, 1.0))
    with pytest.raises(MetaoptLensError, match="matrix 'in' only"):
        made("bridge:gpt2").delta(0, "gate")
    with pytest.raises(MetaoptLensError, match="no layer 3"):
        update.at(3)
    with pytest.raises(MetaoptLensError, match="'in' or 'gate'"):
        update.norms("out")


def test_the_pure_identity() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, u, u_context = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 5), (5,), (5,))
    )
    left, right = implicit_weight_update(weight, u, u_context)
    torch.testing.assert_close((weight + torch.outer(left, right)) @ u, weight @ u_context, rtol=0, atol=1e-12)
    with pytest.raises(MetaoptLensError, match="not 0 without context"):
        implicit_weight_update(weight, 0 * u, u_context)
