"""grad=True: gradients flow from the parts to the weights, and are right; grad=False keeps no graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import bridge_of
from hosts import HOOKED_NAMES, build, build_hf, prompt, shared
from torch import Tensor

from metaopt_lens import Decomposition, decompose

PROMPT = prompt(2, instruction=None)


def scalar(result: Decomposition, kind: str) -> Tensor:
    weights = torch.linspace(-1, 1, result.softmax.meta_gradient.numel(), dtype=torch.float64)
    values = {
        "meta_gradient": lambda: result.softmax.meta_gradient,
        "update": lambda: result.softmax.update,
        "linear": lambda: result.linear.meta_gradient,
        "indirect": lambda: result.effects.indirect,
        "position_matched": lambda: result.z_position_matched,
    }
    return (values[kind]().flatten() * weights).sum()  # type: ignore[union-attr]


def parameter_of(name: str, model: Any, which: str) -> Tensor:
    """The parameter the pass really reads (on a bridge a fused projection is read through copies, one per part)."""
    attn = model.blocks[1].attn
    owner, key = (attn, which) if name.startswith("hooked") else (getattr(attn, which).original_component, "weight")
    parameter: Tensor = getattr(owner, key)
    return parameter


@pytest.mark.parametrize("kind", ["meta_gradient", "update", "linear", "indirect", "position_matched"])
@pytest.mark.parametrize(
    ("name", "which", "entries"),
    [
        ("bridge:gpt2", "v", [(0, 3), (31, 7)]),
        ("bridge:gpt2", "k", [(5, 8)]),
        ("bridge:gpt_neox", "v", [(0, 3), (31, 7)]),
        ("native:learned", "v", [(0, 3), (31, 7)]),
        ("native:learned", "k", [(5, 8)]),
        *[(name, "W_V", [(0, 0, 0), (3, 31, 7)]) for name in HOOKED_NAMES[:1]],
        *[(name, "W_K", [(1, 2, 3)]) for name in HOOKED_NAMES[:1]],
    ],
)
def test_gradients_equal_finite_differences(name: str, which: str, entries: list[tuple[int, ...]], kind: str) -> None:
    model = build(name, dtype=torch.float64)
    parameter = parameter_of(name, model, which)
    value = scalar(decompose(model, PROMPT, grad=True), kind)
    (gradient,) = torch.autograd.grad(value, parameter)
    for entry in entries:
        step = 1e-5
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[entry] += sign * step
            moved.append(float(scalar(decompose(model, PROMPT), kind)))
            with torch.no_grad():
                parameter[entry] -= sign * step
        numeric = (moved[0] - moved[1]) / (2 * step)
        assert float(gradient[entry]) == pytest.approx(numeric, rel=1e-6, abs=1e-8)
    assert float(gradient.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gptj", "bridge:gpt_oss", *HOOKED_NAMES[:2]])
def test_graphs_are_kept_only_when_asked_for(name: str) -> None:
    model = build(name)
    for grad in (True, False):
        result = decompose(model, PROMPT, grad=grad)
        tensors = {
            f"{setting}.{f.name}": value
            for setting, run in result.runs.items()
            for f in dataclasses.fields(run)
            if isinstance(value := getattr(run, f.name), Tensor) and value.is_floating_point()
        }
        tensors |= {"prefix k": result.runs.icl.prefix.k[1], "prefix v": result.runs.zs_matched.prefix.v[0]}
        assert len(tensors) == 3 * 9 + 2
        tensors |= {"softmax": result.softmax.meta_gradient, "linear": result.linear.zero_shot}
        tensors |= {"residual": result.residual.meta_gradient, "per token": result.residual_per_token(1, 1)}
        assert grad or not result.residual.bias.requires_grad
        for key, tensor in tensors.items():
            if not key.endswith("sink"):
                assert tensor.requires_grad is grad, key
    assert all(p.grad is None for p in model.parameters())


def test_a_key_value_weight_before_rotary_and_norm_gets_its_gradient() -> None:
    """On a Llama bridge the parameter is transformers' own v_proj."""
    hf_model = build_hf("llama")
    parameters = {n: p for n, p in hf_model.named_parameters() if "v_proj" in n}
    model = bridge_of(hf_model)
    result = decompose(model, PROMPT, grad=True)
    gradients = torch.autograd.grad(result.softmax.meta_gradient.square().sum(), list(parameters.values()))
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient.shape == parameter.shape
        assert float(gradient.abs().max()) > 1e-4, key


def test_results_with_and_without_graph_are_equal() -> None:
    model = shared("bridge:gpt2")
    with_graph, without = decompose(model, PROMPT, grad=True), decompose(model, PROMPT)
    for setting, run in without.runs.items():
        for field in ("q", "z", "pattern", "k", "own_v"):
            assert torch.equal(getattr(with_graph.runs[setting], field).detach(), getattr(run, field))


def test_a_result_with_a_graph_can_be_shown_and_stored(tmp_path: Any) -> None:
    result = decompose(shared("bridge:gpt2"), PROMPT, grad=True)
    assert "Decomposition of" in repr(result)
    assert len(result.to_frame()) == 12
    result.save(tmp_path / "r")
    loaded = Decomposition.load(tmp_path / "r")
    assert torch.equal(loaded.z, result.z.detach())
