"""The relaxed form read off models: against loops, as matrices, and on a model that does gradient descent."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import make_hooked
from hosts import HOOKED_NAMES, HOST_NAMES, host_values, prompt, requires_hooked, shared
from rounding import STEP, SUM, assert_agree
from torch import Tensor

from metaopt_lens import Decomposition, ICLPrompt, decompose

PROMPT = prompt()
WINDOWED = {"bridge:mistral", "bridge:gemma2", "bridge:gemma3", "bridge:gpt_oss", "bridge:gpt_neo"}
WINDOWED |= {"hooked:window_softcap", "hooked:gpt_neo"}
FEW = ["bridge:gpt2", "bridge:llama", "bridge:mistral", "bridge:bloom", *HOOKED_NAMES[:1]]


@cache
def split(name: str, dtype: torch.dtype = torch.float32) -> Decomposition:
    return decompose(shared(name, dtype), PROMPT, position="all")


@pytest.mark.parametrize("name", HOST_NAMES)
def test_parts_equal_a_loop_over_visible_tokens(name: str) -> None:
    result = split(name)
    group = result.model.n_heads // result.model.n_kv_heads
    layer, head, kv = 2, 3, 3 // group
    k, v = result.runs.icl.k_of(layer)[:, kv].double(), result.runs.icl.v_of(layer)[:, kv].double()
    window = result.runs.icl.rules[layer].window or result.model.n_ctx
    for j, at in enumerate(result.positions):
        q = result.q[j, layer, head].double()
        inside, outside = torch.zeros(8).double(), torch.zeros(8).double()
        for i in range(result.tokenized.n_tokens):
            if i > at or at - i >= window:
                continue
            if i in result.demonstrations:
                inside += v[i] * float(k[i] @ q)
            else:
                outside += v[i] * float(k[i] @ q)
        linear = result.linear
        for ours, loop in (
            (linear.meta_gradient, inside),
            (linear.zero_shot, outside),
            (linear.total, inside + outside),
        ):
            assert_agree(ours[j, layer, head].double(), loop, SUM, of=(inside, outside))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_matrices_times_the_query_are_the_parts(name: str) -> None:
    result = split(name)
    linear = result.linear
    for layer, head in [(0, 0), (1, 2), (2, 3)]:
        for j, at in enumerate(result.positions):
            q = result.q[j, layer, head]
            for matrix, part in (
                (result.w_zsl(layer, head, position=at), linear.zero_shot),
                (result.delta_w_icl(layer, head, position=at), linear.meta_gradient),
            ):
                expected = part[j, layer, head]
                assert_agree(matrix.AB @ q, expected, SUM, of=(matrix.AB.norm() * q.norm(),))


@pytest.mark.parametrize("n_demos", [1, 2])
@pytest.mark.parametrize("name", FEW)
def test_rank_of_delta_w_icl(name: str, n_demos: int) -> None:
    result = decompose(shared(name), prompt(n_demos, instruction=None))
    n_visible = int(result.runs.icl.visible[1, 0, result.demonstrations.slice].sum())
    matrix = result.delta_w_icl(1, 1).AB.double()
    assert matrix.shape == (8, 8)
    assert int(torch.linalg.matrix_rank(matrix, rtol=1e-5)) <= min(8, n_visible)
    if n_demos == 1 and name not in WINDOWED:
        assert n_visible == 5
        assert int(torch.linalg.matrix_rank(matrix, rtol=1e-5)) == 5


def test_the_querys_own_key_value_belongs_to_the_zero_shot_weights() -> None:
    result = split("bridge:gpt2")
    at = result.positions[-1]
    w_zsl, delta = result.w_zsl(1, 0).AB, result.delta_w_icl(1, 0).AB
    k, v = result.runs.icl.k_of(1)[:, 0], result.runs.icl.v_of(1)[:, 0]
    z_tokens = [*range(result.demonstrations.start), *range(result.demonstrations.stop, at + 1)]
    assert_agree(w_zsl, sum(torch.outer(v[i], k[i]) for i in z_tokens), SUM)  # type: ignore[arg-type]
    without_own = sum(torch.outer(v[i], k[i]) for i in z_tokens[:-1])
    assert (w_zsl - without_own).abs().max() > 1e-2
    inside = range(result.demonstrations.start, result.demonstrations.stop)
    assert_agree(delta, sum(torch.outer(v[i], k[i]) for i in inside), SUM)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOST_NAMES)
def test_windows_are_respected_and_reported(name: str) -> None:
    """What a layer does not see weighs nothing in either form, as in the host's own pattern."""
    result = split(name)
    patterns = host_values(shared(name), result.tokenized.ids, "attn.hook_pattern")
    for layer in range(result.model.n_layers):
        own = patterns[layer][:, result.tokenized.query.slice] > 0
        assert torch.equal(own.any(0), result.runs.icl.visible[layer])
        fully = bool(own.any(0)[:, result.demonstrations.slice].all())
        assert result.demos_fully_visible[layer] is fully
        hidden = ~result.runs.icl.visible[layer]
        for form in ("softmax", "linear"):
            parts = result.per_token(layer, 1, form)  # type: ignore[arg-type]
            assert not parts[hidden].any()
    assert (name in WINDOWED) == (not all(result.demos_fully_visible))


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", *HOOKED_NAMES[:1]])
def test_delta_w_icl_does_not_depend_on_the_query(name: str) -> None:
    one, other = decompose(shared(name), [prompt(query="w16 :"), prompt(query="w80 w9 w11 :")])
    for layer in range(3):
        assert_agree(one.delta_w_icl(layer, 2).AB, other.delta_w_icl(layer, 2).AB, 2 * STEP)
        assert not torch.allclose(one.w_zsl(layer, 2).AB, other.w_zsl(layer, 2).AB, atol=1e-2)


def test_fidelity_is_the_cosine_with_the_models_own_z() -> None:
    result = split("bridge:llama")
    f, z = result.linear.zero_shot + result.linear.meta_gradient, result.z
    cosine = (f * z).sum(-1) / (f.norm(dim=-1) * z.norm(dim=-1))
    assert_agree(result.fidelity, cosine, 2 * STEP, of=(1.0,))


# ---- a model that does gradient descent -----------------------------------------------------------------------------

D_X, D_Y, N = 5, 3, 6


def gradient_descent_model(eta: float, w0: Tensor, tokens: dict[int, Tensor]) -> Any:
    """One head without softmax's help: von Oswald et al.'s weights in a HookedTransformer (arXiv:2212.07677)."""
    d = D_X + D_Y
    model = make_hooked(
        "attn_only", normalization_type=None, n_layers=1, d_model=d, n_heads=1, d_head=d, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for token, vector in tokens.items():
            model.embed.W_E[token] = vector
        attn = model.blocks[0].attn
        attn.W_K[0, :D_X, :D_X] = attn.W_Q[0, :D_X, :D_X] = torch.eye(D_X, dtype=torch.float64)
        attn.W_V[0, :D_X, D_X:] = w0.T  # TransformerLens: x W_V, so transposed
        attn.W_V[0, D_X:, D_X:] = -torch.eye(D_Y, dtype=torch.float64)
        attn.W_O[0] = eta / N * torch.eye(d, dtype=torch.float64)
    return model


@requires_hooked
@pytest.mark.parametrize("seed", range(4))
def test_a_model_built_to_do_gradient_descent_is_seen_to_do_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y, w0, x_query, eta = normal(N, D_X), normal(N, D_Y), normal(D_Y, D_X), normal(D_X), 0.7
    # Words carry (x_i, y_i); marks and labels carry nothing.
    tokens = {30 + i: torch.cat([x[i], y[i]]) for i in range(N)} | {16: torch.cat([x_query, -(w0 @ x_query)])}
    model = gradient_descent_model(eta, w0, tokens)
    text = ICLPrompt([(f"w{30 + i}", "w80") for i in range(N)], "w16")
    at_query = decompose(model, text, position=-2)  # the word itself; the colon comes after it
    assert at_query.tokenized.ids[at_query.positions[0]] == 16

    step = -(eta / N) * torch.einsum("ny,nx->yx", x @ w0.T - y, x)
    w_o = model.blocks[0].attn.W_O[0]
    delta = w_o.T @ at_query.delta_w_icl(0, 0).AB
    torch.testing.assert_close(delta[D_X:, :D_X], -step, rtol=0, atol=1e-10)
    delta[D_X:, :D_X] = 0
    assert not delta.any()
    read = -(at_query.linear.meta_gradient[0, 0] @ w_o)[D_X:]
    torch.testing.assert_close(read, step @ x_query, rtol=0, atol=1e-10)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(-read, step @ x_query, rtol=0, atol=1e-10)
    # The query's own term, v_q (k_q . q) with v_q = 2 W_0 x_q, stays on the zero-shot side.
    own = (at_query.linear.zero_shot[0, 0] @ w_o)[D_X:]
    torch.testing.assert_close(own, eta / N * 2 * (w0 @ x_query) * x_query.square().sum(), rtol=0, atol=1e-10)
