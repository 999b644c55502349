"""Half precision: close to what float32 gives on the same (rounded) weights, and never NaN."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import bridge_of, make_hooked
from hosts import HOOKED_NAMES, HOST_NAMES, build_apart, prompt, requires_hooked
from rounding import STEP, assert_agree

from metaopt_lens import Decomposition, decompose

PROMPT = prompt()
# Worst over all families, measured: bfloat16 0.066 (gemma, whose attention is sharpest), float16 0.009.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}


@cache
def pair(name: str, dtype: torch.dtype) -> tuple[Decomposition, Decomposition]:
    """The same weights, rounded to `dtype`, run in `dtype` and in float32."""
    kind, family = name.split(":")
    if kind != "hooked":
        low = bridge_of(build_apart(name).to(dtype))
        reference = bridge_of(build_apart(name).to(dtype).float())
    else:
        low, reference = make_hooked(family, dtype=dtype), make_hooked(family)
        reference.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    return decompose(low, PROMPT), decompose(reference, PROMPT)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", HOST_NAMES)
def test_half_precision_is_close_to_float32(name: str, dtype: torch.dtype) -> None:
    low, reference = pair(name, dtype)
    assert low.model.dtype == str(dtype).removeprefix("torch.")
    assert low.z.dtype == dtype
    parts: dict[str, Any] = {
        "meta_gradient": lambda d: d.softmax.meta_gradient,
        "zero_shot": lambda d: d.softmax.zero_shot,
        "update": lambda d: d.softmax.update,
        "linear": lambda d: d.linear.meta_gradient,
        "indirect": lambda d: d.effects.indirect,
        "total": lambda d: d.effects.total,
    }
    for key, part in parts.items():
        ours, exact = part(low), part(reference)
        assert ours.dtype == torch.float32  # read in half precision, computed in float32
        error = float((ours - exact).norm() / exact.norm())
        assert error < TOLERANCE[dtype], (key, error)
    # The split of the model's own z, at the precision z itself has.
    assert_agree(low.softmax.z, low.z.float(), STEP, dtype=dtype)


@requires_hooked
@pytest.mark.parametrize("factor", [4, 8, 16])
def test_float16_keeps_what_little_attention_remains(factor: int) -> None:
    """float16 probabilities have lost their digits at 1e-6 and are 0 at 1e-8: z without demonstrations was NaN."""
    low, reference = (make_hooked("learned", dtype=torch.float16) for _ in range(2))
    with torch.no_grad():
        for model in (low, reference):
            for block in model.blocks:
                block.attn.W_Q.mul_(factor)
    reference = make_hooked("learned")
    reference.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    ours, exact = (decompose(model, PROMPT, position="all") for model in (low, reference))
    assert float(exact.softmax.remaining.min()) < 1e-5
    assert torch.isfinite(ours.softmax.without_demos).all()
    assert torch.isfinite(ours.effects.direct).all()
    first = ours.softmax.without_demos[:, 0] - exact.softmax.without_demos[:, 0]  # the layer whose input is equal
    assert float(first.abs().max()) < 0.01


@pytest.mark.parametrize("name", ["bridge:llama", *HOOKED_NAMES[:1]])
def test_casting_a_model_is_noticed(name: str) -> None:
    from hosts import build

    model = build(name)
    assert decompose(model, PROMPT).model.dtype == "float32"
    model.to(torch.bfloat16)
    assert decompose(model, PROMPT).z.dtype == torch.bfloat16
    assert decompose(model, PROMPT).model.dtype == "bfloat16"
