"""One patch for all queries: ridge regression on the exact patches, in factors."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hosts import prompt
from test_exact_patch import precise
from torch import Tensor

from metaopt_lens import intervene
from metaopt_lens._errors import HeadError, ModelMismatchError, OptionError, PromptError, UnsupportedModelError
from metaopt_lens.patches import StaticPatch, WeightPatch, exact_patches, fit_static, static_patch

QUERIES = [prompt(query=f"w{6 + 2 * i} w{7 + 2 * i} :") for i in range(4)]
FAMILIES = ["bridge:llama", "bridge:gemma3", "bridge:phi", "bridge:gpt2", "native:learned"]


@cache
def patches(name: str) -> tuple[Any, tuple[WeightPatch, ...]]:
    model = precise(name)
    return model, tuple(exact_patches(model, QUERIES))


def logits(model: Any, ids: Any, n: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([list(ids)]))[0, -n:]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_each_matrix_is_the_ridge_regression(name: str) -> None:
    """Against the normal equations in full matrices."""
    _, found = patches(name)
    ridge = 0.3
    static = fit_static(found, ridge=ridge)
    for matrix in static.matrices:
        side = "out" if matrix == "out" else "in"
        right = torch.cat([patch.right[side][1] for patch in found])
        x = right / right.square().sum(-1, keepdim=True)
        t = torch.cat([patch.left[matrix][1] for patch in found])
        penalty = ridge * x.square().sum(-1).mean()
        gram = x.mT @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
        expected = t.mT @ x @ torch.linalg.inv(gram)
        torch.testing.assert_close(static.dense(1, matrix).AB, expected, rtol=0, atol=1e-9)

        # It is the minimum: any other matrix is worse.
        def loss(change: Tensor, x: Tensor = x, t: Tensor = t, penalty: Tensor = penalty) -> float:
            return float((t - x @ change.mT).square().sum() + penalty * change.square().sum())

        moved = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for step in (1e-3, -1e-3):
            assert loss(static.dense(1, matrix).AB) < loss(expected + step * moved)


def test_the_scale_is_the_ridge_regression_too() -> None:
    _, found = patches("bridge:gemma3")
    static = fit_static(found, ridge=0.3)
    assert static.scale is not None
    u = torch.cat([patch.u[2] for patch in found])
    y = torch.cat([patch.u[2] / patch.scale[2] for patch in found if patch.scale is not None])
    penalty = 0.3 * y.square().sum(0).mean()
    columns = [
        torch.linalg.lstsq(
            torch.cat([y[:, i], penalty.sqrt()[None]])[:, None], torch.cat([u[:, i], torch.zeros(1)])[:, None]
        ).solution[0, 0]
        for i in range(u.shape[1])
    ]
    torch.testing.assert_close(static.scale[2], torch.stack(columns), rtol=0, atol=1e-9)


def test_with_a_small_ridge_the_fitted_queries_are_those_in_context() -> None:
    """Fewer tokens than dimensions: what was fitted is fitted exactly, and the patch is then exact on it."""
    model, found = patches("native:learned")
    static = fit_static(found[:2], ridge=1e-12)
    for patch in found[:2]:
        with intervene(model, static):
            fitted = logits(model, patch.zero_shot_ids, 3)
        in_context = logits(model, patch.tokens.ids, 3)
        torch.testing.assert_close(fitted, in_context, rtol=0, atol=1e-5)
        assert (logits(model, patch.zero_shot_ids, 3) - in_context).abs().max() > 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_it_acts_on_a_query_that_was_not_fitted(name: str) -> None:
    """The product of an input matrix changes by dW x, at every token behind S and nowhere else."""
    model, found = patches(name)
    static, patch = fit_static(found[:3]), found[3]
    at = "blocks.0.mlp.out"
    seen: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        seen[hook.name] = tensor.reshape(-1, tensor.shape[-1])

    reads = [(f"{at}.hook_in", keep), (f"{at}.hook_out", keep)]
    ids = torch.tensor([list(patch.zero_shot_ids)])
    with intervene(model, static), torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=reads)
    hidden, out = seen[f"{at}.hook_in"], seen[f"{at}.hook_out"]
    assert torch.isfinite(out).all()
    if "out" not in static.matrices:
        return
    weight, bias = model.blocks[0].mlp.W_out.detach(), model.blocks[0].mlp.b_out
    plain = hidden @ weight + (0 if bias is None else bias.detach())
    start = patch.tokens.prefix.stop
    torch.testing.assert_close(out[:start], plain[:start], rtol=0, atol=1e-9)
    added = hidden[start:] @ static.dense(0, "out").AB.mT
    torch.testing.assert_close(out[start:], plain[start:] + added, rtol=0, atol=1e-9)
    assert added.abs().max() > 1e-3


def test_bad_input() -> None:
    model, found = patches("bridge:llama")
    with pytest.raises(PromptError, match="two queries or more, got 1"):
        static_patch(model, QUERIES[:1])
    with pytest.raises(PromptError, match="those of prompt 1 are not those of prompt 0"):
        static_patch(model, [QUERIES[0], prompt(3)])
    with pytest.raises(OptionError, match="ridge must be above 0, got 0"):
        fit_static(found, ridge=0.0)
    static = fit_static(found)
    with pytest.raises(HeadError, match="there is no layer 3"):
        static.dense(3, "in")
    with pytest.raises(OptionError, match="changes the matrices 'gate', 'in', 'out', there is no 'o'"):
        static.dense(0, "o")
    with pytest.raises(ModelMismatchError, match="this patch was"), intervene(precise("bridge:qwen2"), static):
        pass
    mixture = precise("bridge:mixtral")
    with pytest.raises(
        UnsupportedModelError, match=r"every token changes experts of its own, and .* too little to fit one"
    ):
        static_patch(mixture, QUERIES[:2])


def test_saved_and_read_again_it_is_the_same(tmp_path: Any) -> None:
    model, found = patches("bridge:gemma3")
    static = fit_static(found[:3])
    again = StaticPatch.load(static.save(tmp_path / "static"))
    assert repr(again) == repr(static)
    assert "4 demonstrations as changes of gate and in in 3 layers, fitted on 3 queries with ridge 0.1" in repr(static)
    ids = found[3].zero_shot_ids
    with intervene(model, again):
        read = logits(model, ids, 3)
    with intervene(model, static):
        assert torch.equal(read, logits(model, ids, 3))
