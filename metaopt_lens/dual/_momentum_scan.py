"""Momentum: the moving average of past values (docs/theory.md, section 6; arXiv:2212.10559, section 5.2)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.dual._weighted import at_least_float32

_CHUNK = 64


def check_eta(eta: float | Tensor) -> Tensor:
    """`eta` as a tensor; raises `OptionError` unless every entry is in [0, 1).

    Args:
        eta: decay per token, for all heads or one for each.
    """
    tensor = eta if isinstance(eta, Tensor) else torch.tensor(eta, dtype=torch.float64)
    if not tensor.is_floating_point():
        tensor = tensor.double()
    wrong = ~((tensor >= 0) & (tensor < 1))  # True for NaN too
    if bool(wrong.any()):
        raise OptionError(
            f"eta must be at least 0 and less than 1 (0 is plain attention), got {float(tensor[wrong].flatten()[0])}."
        )
    return tensor


def momentum_values(
    values: Float[Tensor, "*batch src kv_head d_head"],
    eta: float | Float[Tensor, ""] | Float[Tensor, " head"],
    *,
    state: Float[Tensor, "*batch head d_head"] | None = None,
    valid: Bool[Tensor, "*batch src"] | None = None,
) -> Float[Tensor, "*batch src head d_head"]:
    """``EMA_t = sum_{i<t} eta^(t-i) v_i = eta (EMA_{t-1} + v_{t-1})`` at every position t.

    A chunked scan: linear time and memory in the number of tokens, and no negative power of eta, so that nothing
    overflows however long the sequence. Computed in float32 at least; differentiable in `values`, `eta` and `state`.

    Args:
        values: values of all sources. With one eta per head, head ``h`` reads key-value head ``h // (head / kv_head)``;
            with a single eta the result has one head per key-value head.
        eta: in [0, 1), for all heads or one for each.
        state: the average at the first position, left by tokens that ran before (see `momentum_state`).
        valid: which sources are tokens. Padding contributes nothing and does not advance t.

    Raises:
        OptionError: eta outside [0, 1), or as many etas as the heads cannot have.
    """
    return _all_positions(values, eta, state, valid)[..., :-1, :, :]


def momentum_state(
    values: Float[Tensor, "*batch src kv_head d_head"],
    eta: float | Float[Tensor, ""] | Float[Tensor, " head"],
    *,
    state: Float[Tensor, "*batch head d_head"] | None = None,
    valid: Bool[Tensor, "*batch src"] | None = None,
) -> Float[Tensor, "*batch head d_head"]:
    """The average at the position after the last token: the `state` that continues the sequence.

    Args:
        values: values of all sources.
        eta: in [0, 1), for all heads or one for each.
        state: the average at the first position, left by tokens that ran before; None at the start of a sequence.
        valid: which sources are tokens; padding does not advance t. None if all are.
    """
    return _all_positions(values, eta, state, valid)[..., -1, :, :]


def momentum_weights(
    eta: Float[Tensor, " head"],
    dst_positions: Int[Tensor, "*rows dst"],
    src_positions: Int[Tensor, "*rows src"],
) -> Float[Tensor, "*rows head dst src"]:
    """The decay matrix, ``eta^(t-i)`` for sources ``i < t``, else 0: quadratic, for few destinations or as an oracle.

    With `weighted_values` it gives the average itself or any share of it.

    Args:
        eta: in [0, 1), one for each head.
        dst_positions: positions of the destinations.
        src_positions: positions of the sources.
    """
    distance = (dst_positions[..., :, None] - src_positions[..., None, :])[..., None, :, :]
    powers = eta[:, None, None] ** distance.clamp_min(1).to(eta.dtype)
    return torch.where(distance > 0, powers, 0.0)


def _all_positions(values: Tensor, eta: float | Tensor, state: Tensor | None, valid: Tensor | None) -> Tensor:
    """The average at every position and at the one after the last: ``[*batch, src + 1, head, d_head]``."""
    x = at_least_float32(values)
    rates = check_eta(eta).to(x.device)
    n_kv = x.shape[-2]
    if rates.ndim > 1 or (rates.ndim == 1 and rates.shape[0] % n_kv):
        raise OptionError(
            f"eta must be one number or one for each head, a multiple of the {n_kv} key-value heads; got a tensor of "
            f"shape {list(rates.shape)}."
        )
    if rates.ndim == 1 and rates.shape[0] != n_kv:
        x = repeat(x, "... kv d -> ... (kv group) d", group=rates.shape[0] // n_kv)
    rates = rates.to(x.dtype).expand(x.shape[-2])
    count = None
    if valid is not None:  # tokens to the front, in their order; then every slot reads the average at its own t
        order = torch.argsort((~valid).byte(), dim=-1, stable=True)
        x = x.masked_fill(~valid[..., None, None], 0.0)
        x = x.gather(-3, order[..., None, None].expand(x.shape))
        count = valid.long().cumsum(-1)
        count = torch.cat([torch.zeros_like(count[..., :1]), count], dim=-1)
    batch = x.shape[:-3]
    flat = x.reshape(batch.numel(), *x.shape[-3:])
    start = None if state is None else at_least_float32(state).to(flat).reshape(batch.numel(), *x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        averages = _scan(flat * rates[:, None], rates, start)
    averages = averages.reshape(*batch, *averages.shape[1:])
    if count is not None:
        averages = averages.gather(-3, count[..., None, None].expand(averages.shape))
    return averages


def _scan(
    x: Float[Tensor, "batch pos head d_head"],
    rates: Float[Tensor, " head"],
    start: Float[Tensor, "batch head d_head"] | None,
) -> Float[Tensor, "batch pos_and_one head d_head"]:
    """``y_0 = start, y_{s+1} = rate y_s + x_s``: within chunks by a small matrix, between chunks by the same scan."""
    n_batch, n_pos, n_heads, d_head = x.shape
    if start is None:
        start = x.new_zeros(n_batch, n_heads, d_head)
    if n_pos == 0:
        return start[:, None]
    size = min(_CHUNK, n_pos)
    n_chunks = -(-n_pos // size)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, n_chunks * size - n_pos))
    chunks = rearrange(padded, "batch (chunk pos) head d -> head pos (batch chunk d)", pos=size)
    powers = _powers(rates, size)
    # Row s, column i: rate^(s-1-i) for i < s; the last row carries the whole chunk to its end.
    lag = torch.arange(size + 1, device=x.device)[:, None] - 1 - torch.arange(size, device=x.device)
    decay = torch.where(lag >= 0, powers[:, lag.clamp_min(0)], 0.0)  # [head, pos + 1, pos]
    local = rearrange(
        decay @ chunks, "head pos (batch chunk d) -> batch chunk pos head d", batch=n_batch, chunk=n_chunks
    )
    carried = start[:, None]
    if n_chunks > 1:
        carried = _scan(local[:, :-1, -1], powers[:, size], start)
    fade = powers.T[:, :, None]  # [pos + 1, head, 1]
    full = local + fade * carried[:, :, None]
    inside = rearrange(full[:, :, :-1], "batch chunk pos head d -> batch (chunk pos) head d")
    # The position after the last may lie inside the last, padded chunk.
    return torch.cat([inside, full[:, -1:, -1]], dim=1)[:, : n_pos + 1]


def _powers(rates: Float[Tensor, " head"], n: int) -> Float[Tensor, "head power"]:
    """``rate^0 ... rate^n``, raised in float64 where the device has it."""
    wide = rates if rates.device.type == "mps" else rates.double()
    return (wide[:, None] ** torch.arange(n + 1, device=rates.device).to(wide)).to(rates.dtype)
