"""Momentum-based attention as hooks (docs/theory.md, section 6; arXiv:2212.10559, section 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.dual import check_eta, momentum_state, momentum_values
from metaopt_lens.interventions._heads import Heads, head_mask
from metaopt_lens.models import PASS, AddsMomentum, Hook, HostPass, Late, LensModel

# Changes the moving average of one layer: (layer, running pass, values of all sources, average at the new tokens).
Correction = Callable[[int, HostPass, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MomentumAttention:
    """``MoAttn = Attn + EMA_t`` with ``EMA_t = sum_{i<t} eta^(t-i) v_i``, per head, before W_O.

    Works in any forward pass of the host: padded (padding contributes nothing and does not advance t), behind a shared
    prefix, cached and generating, in training. The published evidence (arXiv:2212.10559) is on models trained from
    scratch with it; on a pretrained model it is another experiment.

    Attributes:
        eta: in [0, 1): one number, one per layer, or ``[layer, head]``. A tensor that requires grad can be learned.
            0 is plain attention, bit for bit.
        heads: only these heads, as in ``["L3H7"]``; None for all.
    """

    eta: float | Sequence[float] | Sequence[Sequence[float]] | Tensor
    heads: Heads = None

    def __post_init__(self) -> None:
        try:
            eta = self.eta if isinstance(self.eta, Tensor) else torch.tensor(self.eta, dtype=torch.float64)
        except (TypeError, ValueError):
            raise OptionError(
                f"eta must be a number, one per layer, or a layers x heads table, got {self.eta!r}."
            ) from None
        object.__setattr__(self, "eta", check_eta(eta))

    def etas(self, model: LensModel) -> Float[Tensor, "layer head"]:
        """eta of every head; 0 for heads that were not chosen.

        Raises:
            OptionError: as many etas as there are neither layers nor heads.
            HeadError: an unknown head.
        """
        n_layers, n_heads = model.info.n_layers, model.info.n_heads
        eta = self.eta
        assert isinstance(eta, Tensor)  # made in __post_init__
        if eta.ndim == 1:
            eta = eta[:, None]
        if eta.ndim > 2 or (eta.ndim == 2 and (eta.shape[0] != n_layers or eta.shape[1] not in {1, n_heads})):
            shape = list(self.eta.shape)  # type: ignore[union-attr]
            raise OptionError(
                f"eta must be one number, {n_layers} (one per layer) or [{n_layers}, {n_heads}] (layers x heads) for "
                f"{model.info.name}; got shape {shape}."
            )
        chosen = head_mask(model.info, self.heads).to(eta.device)
        return torch.where(chosen, eta.expand(n_layers, n_heads), 0.0)

    def hooks(self, model: LensModel) -> list[Hook]:
        """The hooks that add it.

        Raises:
            OptionError, HeadError: see `etas`.
        """
        return momentum_hooks(model, self.etas(model))


def momentum_hooks(
    model: LensModel, eta: Float[Tensor, "layer head"], corrections: Sequence[Correction] = ()
) -> list[Hook]:
    """Hooks that add the moving average of every layer whose eta is not 0 (or is being learned).

    Values are read as they are after all other hooks at them, also those attached later.
    """
    layers = [layer for layer in range(model.info.n_layers) if eta.requires_grad or bool((eta[layer] != 0).any())]
    if not layers:
        return []
    running: list[tuple[HostPass, bool]] = []

    def begin(host_pass: HostPass) -> None:
        running[:] = [(host_pass, bool(host_pass.valid.all()))]

    hooks: list[Hook] = [(PASS, begin)]
    for layer in layers:
        hooks += _Layer(model, layer, eta[layer], lambda: running[0], corrections).hooks()
    return hooks


class _Layer:
    """One layer's average. Under a sliding cache, which forgets, it is remembered from pass to pass."""

    def __init__(
        self,
        model: LensModel,
        layer: int,
        eta: Float[Tensor, " head"],
        current: Callable[[], tuple[HostPass, bool]],
        corrections: Sequence[Correction],
    ) -> None:
        self._model, self._layer, self._eta = model, layer, eta
        self._current, self._corrections = current, corrections
        self._forgets = model.score_rule(layer).window is not None
        self._values: Tensor | None = None
        self._remembered: tuple[int, Tensor, Tensor] | None = None  # slots, their last value, average after them

    def hooks(self) -> list[Hook]:
        name = self._model.hook_name
        return [
            (name("v", self._layer), Late(self._keep)),
            (name("z", self._layer), AddsMomentum(self._add, self._eta)),
        ]

    def _keep(self, v: Tensor) -> None:
        self._values = v

    def _add(self, z: Tensor) -> Tensor:
        v, (host_pass, unpadded) = self._values, self._current()
        assert v is not None
        self._values = None
        eta = self._eta.to(v.device)
        valid = None if unpadded else host_pass.valid.to(v.device)
        past = host_pass.past(self._layer)[1] if host_pass.n_past else None
        new_valid = None if valid is None else valid[:, host_pass.n_past :]
        state = None
        if host_pass.n_past:
            state = self._past_state(host_pass, past, eta, valid)
        average = momentum_values(v, eta, state=state, valid=new_valid)
        if self._forgets:
            after = momentum_state(v.detach(), eta.detach(), state=state, valid=new_valid)
            self._remembered = (host_pass.n_past + v.shape[1], v[:, -1].detach(), after.detach())
        if self._corrections:
            values = host_pass.all_values(self._layer, v)
            for correct in self._corrections:
                average = correct(self._layer, host_pass, values, average)
        return (z.to(average.dtype) + average).to(z.dtype)

    def _past_state(self, host_pass: HostPass, past: Tensor | None, eta: Tensor, valid: Tensor | None) -> Tensor:
        n_past = host_pass.n_past
        if past is not None and past.shape[1] == n_past:
            return momentum_state(past.to(eta.device), eta, valid=None if valid is None else valid[:, :n_past])
        if self._remembered is not None and past is not None:
            n_slots, last, state = self._remembered
            if n_slots == n_past and last.shape[0] == past.shape[0] and torch.equal(last.to(past), past[:, -1]):
                return state
        held = 0 if past is None else past.shape[1]
        raise UnsupportedModelError(
            f"the cache of layer {self._layer} holds {held} of {n_past} past tokens (sliding window), and momentum "
            "needs them all: run the whole sequence within one intervene(...), or pass a DynamicCache() without config."
        )
