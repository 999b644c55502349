"""The moving average of values against the decay matrix, its recursion, and autograd's own checks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metaopt_lens._errors import OptionError
from metaopt_lens.dual import momentum_state, momentum_values, momentum_weights, weighted_values

LENGTHS = [1, 2, 5, 63, 64, 65, 200, 511, 4096]
ETAS = [0.0, 0.3, 0.9, 0.999]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(values: Tensor, eta: Tensor, valid: Tensor | None = None) -> Tensor:
    """By the decay matrix, in float64, from values and eta as they are stored."""
    n = values.shape[-3]
    position = torch.arange(n).expand(values.shape[:-2]) if valid is None else valid.long().cumsum(-1) - valid.long()
    weights = momentum_weights(eta.double(), position, position)
    if valid is not None:
        weights = weights * valid[..., None, None, :]
    return weighted_values(weights, values.double())


def by_hand(values: Tensor, eta: Tensor) -> Tensor:
    """The recursion, one token after the other."""
    average, out = torch.zeros_like(values[0]), []
    for v in values:
        out.append(average)
        average = eta[:, None] * (average + v)
    return torch.stack(out)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp_min(1e-30)
    assert (actual.double() - expected.double()).abs().max() <= tolerance * scale


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_decay_matrix(n: int, eta: float, dtype: torch.dtype, tolerance: float) -> None:
    values = draw(2, n, 1, 4, seed=n, dtype=dtype)
    rate = torch.tensor([eta], dtype=dtype)
    found = momentum_values(values, rate)
    assert found.dtype == dtype
    close(found, oracle(values, rate), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worst_case_of_constant_values(dtype: torch.dtype) -> None:
    """All values alike, so that errors add up instead of cancelling; the limit is eta / (1 - eta)."""
    rate = torch.tensor([0.999], dtype=dtype)
    values = torch.ones(4096, 1, 1, dtype=dtype)
    found = momentum_values(values, rate)
    close(found, oracle(values, rate), 1e-12 if dtype == torch.float64 else 1e-5)
    eta = rate.double()
    torch.testing.assert_close(found[-1, 0].double(), eta * (1 - eta**4095) / (1 - eta), rtol=1e-5, atol=0)


def test_equals_its_recursion_with_one_eta_per_head() -> None:
    values, etas = draw(150, 4, 3), torch.tensor([0.0, 0.2, 0.7, 0.99], dtype=torch.float64)
    close(momentum_values(values, etas), by_hand(values, etas), 1e-13)
    assert torch.equal(momentum_values(values, etas)[:, 0], torch.zeros(150, 3, dtype=torch.float64))


def test_the_first_position_has_no_past_and_the_second_only_the_first() -> None:
    values = draw(3, 2, 4)
    found = momentum_values(values, 0.25)
    assert torch.equal(found[0], torch.zeros(2, 4, dtype=torch.float64))
    assert torch.equal(found[1], 0.25 * values[0])
    close(found[2], 0.0625 * values[0] + 0.25 * values[1], 1e-15)


def test_grouped_query_heads_read_their_key_value_head() -> None:
    values, etas = draw(2, 70, 2, 3), torch.tensor([0.1, 0.5, 0.9, 0.95], dtype=torch.float64)
    found = momentum_values(values, etas)
    for head in range(4):
        alone = momentum_values(values[:, :, head // 2, None], etas[head])
        torch.testing.assert_close(found[:, :, head, None], alone, rtol=0, atol=1e-14)
    close(found, oracle(values, etas), 1e-13)
    assert momentum_values(values, 0.5).shape == (2, 70, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.5, 0.999])
def test_half_precision_is_read_not_computed_in(dtype: torch.dtype, eta: float) -> None:
    """A half-precision eta of .999 would be 1; a sum of 4096 values would stall."""
    values = draw(4096, 1, 2, dtype=dtype).abs()
    found = momentum_values(values, eta)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    close(found, oracle(values, torch.tensor([eta], dtype=torch.float32)), 1e-5)


def test_work_is_linear_in_length() -> None:
    def multiplications(n: int) -> int:
        values = torch.zeros(1, n, 2, 4, requires_grad=True)
        with FlopCounterMode(display=False) as counted:
            momentum_values(values, torch.tensor([0.5, 0.9], requires_grad=True)).sum().backward()
        return counted.get_total_flops()

    assert 0 < multiplications(16384) <= 2.1 * multiplications(8192) <= 2.1**2 * multiplications(4096)


def test_no_overflow_where_negative_powers_would() -> None:
    values = torch.ones(20_000, 1, 1)
    found = momentum_values(values, 0.01)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[-1], torch.tensor([[0.01 / 0.99]]))


@pytest.mark.parametrize("split", [0, 1, 64, 77, 130])
def test_a_state_continues_a_sequence(split: int) -> None:
    values, etas = draw(2, 130, 3, 4), torch.tensor([0.2, 0.9, 0.999], dtype=torch.float64)
    whole = momentum_values(values, etas)
    state = momentum_state(values[:, :split], etas)
    close(
        torch.cat([momentum_values(values[:, :split], etas), momentum_values(values[:, split:], etas, state=state)], 1),
        whole,
        1e-13,
    )
    close(momentum_state(values[:, split:], etas, state=state), momentum_state(values, etas), 1e-13)


@pytest.mark.parametrize("n_pad", [1, 30, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_changes_nothing(n_pad: int, dtype: torch.dtype) -> None:
    values, etas = draw(100, 2, 3, dtype=dtype), torch.tensor([0.6, 0.99], dtype=dtype)
    plain = momentum_values(values, etas)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    junk = torch.full((n_pad, 2, 3), torch.nan, dtype=dtype)
    yes, no = torch.ones(100, dtype=torch.bool), torch.zeros(n_pad, dtype=torch.bool)
    left = momentum_values(torch.cat([junk, values]), etas, valid=torch.cat([no, yes]))
    right = momentum_values(torch.cat([values, junk]), etas, valid=torch.cat([yes, no]))
    close(left[n_pad:], plain, tolerance)
    close(right[:100], plain, tolerance)
    middle = momentum_values(
        torch.cat([values[:40], junk, values[40:]]), etas, valid=torch.cat([yes[:40], no, yes[40:]])
    )
    close(torch.cat([middle[:40], middle[40 + n_pad :]]), plain, tolerance)
    for padded, mask in (
        (torch.cat([junk, values]), torch.cat([no, yes])),
        (torch.cat([values, junk]), torch.cat([yes, no])),
    ):
        close(momentum_state(padded, etas, valid=mask), momentum_state(values, etas), tolerance)


def test_a_ragged_batch_equals_its_rows() -> None:
    values = draw(3, 90, 2, 4)
    valid = torch.stack([torch.arange(90) >= 0, torch.arange(90) >= 25, torch.arange(90) < 60])
    etas = torch.tensor([0.3, 0.95], dtype=torch.float64)
    found = momentum_values(values, etas, valid=valid)
    close(found[valid], oracle(values, etas, valid)[valid], 1e-12)
    for row in range(3):
        close(found[row, valid[row]], momentum_values(values[row, valid[row]], etas), 1e-14)


@pytest.mark.parametrize("n", [1, 6, 70])
def test_gradients(n: int) -> None:
    values = draw(2, n, 2, 1).requires_grad_()
    etas = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    state = draw(2, 2, 1, seed=1).requires_grad_()
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, : n // 2] = False
    assert torch.autograd.gradcheck(
        lambda v, e, s: momentum_values(v, e, state=s, valid=valid), (values, etas, state), fast_mode=n > 10
    )


def test_gradient_in_eta_at_zero_is_the_previous_value() -> None:
    values, eta = draw(5, 1, 2), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(momentum_values(values, eta)[4].sum(), eta)
    torch.testing.assert_close(gradient, values[3].sum()[None])


@pytest.mark.parametrize("eta", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_eta_out_of_range(eta: float) -> None:
    with pytest.raises(OptionError, match=rf"eta must be at least 0 and less than 1 .*got {eta}"):
        momentum_values(draw(3, 1, 2), eta)


def test_wrong_number_of_etas() -> None:
    with pytest.raises(OptionError, match=r"multiple of the 2 key-value heads; got a tensor of shape \[3\]"):
        momentum_values(draw(4, 2, 2), torch.tensor([0.1, 0.2, 0.3]))
