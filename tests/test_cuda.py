"""On a GPU: the same numbers as on the CPU, and results that stay on the model's device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import build, host_z, prompt, requires_hooked, tokenized
from rounding import PASS, assert_agree

from metaopt_lens import Decomposition, decompose, wrap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = [prompt(3, query="w16 :"), prompt(3, query="w22 w23 w24 :"), prompt(2, instruction=None, first=60)]
FAMILIES = ["bridge:gpt2", "bridge:llama", "bridge:gemma2", "bridge:gpt_oss"]
HOOKED = [pytest.param(f"hooked:{kind}", marks=requires_hooked) for kind in ("learned", "rotary", "alibi")]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def full_float32() -> Any:
    """No TF32: the comparison is with the CPU's float32."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


def on_cuda(name: str, dtype: torch.dtype) -> Any:
    return build(name, dtype=dtype).to("cuda")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, *HOOKED])
def test_the_same_numbers_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    ours = decompose(on_cuda(name, dtype), PROMPTS, position="all")
    exact = decompose(build(name, dtype=dtype), PROMPTS, position="all")
    for a, b in zip(ours, exact, strict=True):
        assert a.z.device.type == "cuda"
        parts = {
            "meta_gradient": (a.softmax.meta_gradient, b.softmax.meta_gradient),
            "update": (a.softmax.update, b.softmax.update),
            "linear": (a.linear.meta_gradient, b.linear.meta_gradient),
            "total": (a.effects.total, b.effects.total),
            "residual": (a.residual.attention_output, b.residual.attention_output),
        }
        for key, (one, other) in parts.items():
            assert one.device.type == "cuda"
            error = float((one.cpu() - other).norm() / other.norm())
            assert error < TOLERANCE[dtype], (key, error)


@pytest.mark.parametrize("name", [*FAMILIES, *HOOKED])
def test_parts_sum_to_the_hosts_own_z(name: str) -> None:
    model = on_cuda(name, torch.float32)
    tokens = tokenized(model, PROMPTS[0])
    seen = host_z(model, tokens.ids)[tokens.query.slice]
    result = decompose(model, PROMPTS[0], position="all")
    assert_agree(result.softmax.z, seen, PASS)


@pytest.mark.parametrize("name", [*FAMILIES, *HOOKED])
def test_everything_that_reads_a_result_works_on_the_device(name: str, tmp_path: Any) -> None:
    model = on_cuda(name, torch.bfloat16)
    assert wrap(model).device.type == "cuda"
    result = decompose(model, PROMPTS[1], position="all")
    assert len(result.to_frame()) == len(result.positions) * 12
    assert "Decomposition" in repr(result)
    assert result.delta_w_icl(1, 1).AB.device.type == "cuda"
    assert result.token_shares(1, 1).device.type == "cuda"
    assert result.residual_per_token(1, 1).device.type == "cuda"
    assert result.per_demo("linear").device.type == "cuda"
    assert len(result.demos_fully_visible) == 3
    result.save(tmp_path / "r")
    loaded = Decomposition.load(tmp_path / "r")  # on the CPU: it may be read without a GPU
    assert loaded.z.device.type == "cpu"
    assert torch.equal(loaded.z, result.z.cpu())
    if name.startswith("bridge"):
        again = Decomposition.load(tmp_path / "r", model=build(name, dtype=torch.bfloat16))
        torch.testing.assert_close(again.residual.bias, result.residual.bias.cpu())


def test_gradients_flow_on_the_device() -> None:
    model = on_cuda("bridge:llama", torch.float32)
    result = decompose(model, PROMPTS[0], grad=True)
    result.softmax.meta_gradient.square().sum().backward()
    weight = model.blocks[1].attn.v.original_component.weight
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0
