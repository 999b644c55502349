"""The split against the model itself: its parts sum to what the host's own hooks show, on every family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hosts import FLOAT32_SOFTMAX, HOOKED_NAMES, HOST_NAMES, POST_NORMED, host_values, host_z, prompt, shared, sizes
from rounding import SUM, assert_agree, of_pass
from torch import Tensor

from metaopt_lens import Decomposition, decompose

PROMPTS = {"instruction": prompt(), "bare": prompt(3, query="w16 :", instruction=None, first=50)}
# transformers' mixture-of-experts kernels have no float64.
NO_DOUBLE = {"bridge:gpt_oss", "bridge:mixtral"}


@cache
def split(name: str, text: str = "instruction", dtype: torch.dtype = torch.float32) -> Decomposition:
    return decompose(shared(name, dtype), PROMPTS[text], position="all")


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("name", HOST_NAMES)
def test_parts_sum_to_the_models_own_z(name: str, text: str) -> None:
    model, result = shared(name), split(name, text)
    z = host_z(model, result.tokenized.ids)[result.tokenized.query.slice]
    parts = result.softmax
    assert_agree(parts.zero_shot + parts.meta_gradient, z, of_pass(name))
    assert_agree(result.z, z, of_pass(name))
    # Neither part is trivially all or nothing.
    assert parts.meta_gradient.norm() > 0.05 * z.norm()
    assert parts.zero_shot.norm() > 0.05 * z.norm()


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name not in NO_DOUBLE])
def test_parts_sum_to_z_in_float64(name: str) -> None:
    """Where the host shows its pattern before z; elsewhere the pattern is rebuilt, in float64, from q and k, while
    transformers' own softmax computes in float32 whatever the dtype (measured 2e-7 on OPT, 5e-7 on GPT-J)."""
    result = split(name, dtype=torch.float64)
    z = host_z(shared(name, torch.float64), result.tokenized.ids)[result.tokenized.query.slice]
    tolerance = 1e-5 if name in FLOAT32_SOFTMAX else 1e-12
    torch.testing.assert_close(result.softmax.z, z, rtol=0, atol=tolerance)
    assert result.softmax.z.dtype == torch.float64


@pytest.mark.parametrize("name", HOST_NAMES)
def test_residual_parts_sum_to_the_attention_output(name: str) -> None:
    result = split(name)
    out = _attention_output(name, shared(name), result.tokenized.ids)[result.tokenized.query.slice]
    residual = result.residual
    summed = residual.zero_shot.sum(-2) + residual.meta_gradient.sum(-2) + residual.bias
    assert_agree(summed, out, of_pass(name))
    assert_agree(residual.attention_output, out, of_pass(name))


def _attention_output(name: str, model: Any, ids: tuple[int, ...]) -> Tensor:
    """[pos, layer, d_model]: after W_O and b_O, before any norm."""
    if name not in POST_NORMED:
        hook = "hook_attn_out" if name.startswith("hooked:") else "attn.o.hook_out"
        return torch.stack(host_values(model, ids, hook), dim=1)
    seen: list[Tensor] = []
    handles = [
        block.attn.register_forward_hook(lambda _module, _inputs, out: seen.append(out[0])) for block in model.blocks
    ]
    try:
        with torch.no_grad():
            model(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize("form", ["softmax", "linear"])
@pytest.mark.parametrize("name", HOST_NAMES)
def test_tokens_and_demonstrations_sum_to_the_whole(name: str, form: str) -> None:
    result = split(name)
    whole = getattr(result, form)
    terms = (whole.zero_shot, whole.meta_gradient)
    inside = result.demonstrations.slice
    per_demo = result.per_demo(form)
    assert per_demo.shape[-2] == len(PROMPTS["instruction"].demos)
    assert_agree(per_demo.sum(-2), whole.meta_gradient, SUM, of=terms)
    n_layers, n_heads = sizes(shared(name))
    for layer, head in [(0, 0), (1, n_heads - 1), (n_layers - 1, 1)]:
        tokens = result.per_token(layer, head, form)
        assert tokens.shape[-2] == result.tokenized.n_tokens
        d = tokens[:, inside].sum(-2)
        assert_agree(d, whole.meta_gradient[:, layer, head], SUM, of=terms)
        rest = tokens.sum(-2) - d
        assert_agree(rest, whole.zero_shot[:, layer, head], SUM, of=terms)
        for i, span in enumerate(result.tokenized.demos):
            one = tokens[:, span.slice].sum(-2)
            assert_agree(one, per_demo[:, layer, head, i], SUM, of=terms)


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "bridge:gpt_oss", *HOOKED_NAMES[:1]])
def test_residual_parts_per_token_sum_to_the_heads_share(name: str) -> None:
    result = split(name)
    tokens = result.residual_per_token(1, 2)
    residual = result.residual
    whole = (residual.zero_shot + residual.meta_gradient)[:, 1, 2]
    assert_agree(tokens.sum(-2), whole, SUM)
    inside = tokens[:, result.demonstrations.slice].sum(-2)
    assert_agree(inside, residual.meta_gradient[:, 1, 2], SUM)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_mass_and_remaining_are_the_patterns_own_sums(name: str) -> None:
    """The sink takes what the rows of the host's own pattern lack."""
    result = split(name)
    tokens = result.tokenized
    patterns = host_values(shared(name), tokens.ids, "attn.hook_pattern")
    pattern = torch.stack(patterns)[:, :, tokens.query.slice].permute(2, 0, 1, 3)  # dst layer head src
    inside = pattern[..., tokens.demonstrations.slice].sum(-1)
    assert_agree(result.softmax.mass, inside, of_pass(name))
    assert_agree(result.softmax.remaining, 1 - inside, of_pass(name), of=(1.0,))
    assert_agree(result.sink, 1 - pattern.sum(-1), of_pass(name), of=(1.0,))
    assert (name == "bridge:gpt_oss") == bool(result.sink.max() > 1e-3)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_token_shares_sum_to_one_over_the_demonstrations(name: str) -> None:
    result = split(name)
    for form in ("softmax", "linear"):
        shares = result.token_shares(1, 1, form)  # type: ignore[arg-type]
        inside = shares[:, result.demonstrations.slice]
        visible = result.runs.icl.visible[1][:, result.demonstrations.slice].any(-1)
        assert_agree(inside.sum(-1), visible.to(inside), SUM, of=(shares,))
        shares[:, result.demonstrations.slice] = 0.0
        assert not shares.any()
