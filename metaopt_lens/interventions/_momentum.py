"""Momentum-based attention as hooks (docs/theory.md, section 6; arXiv:2212.10559, section 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.dual import check_eta, momentum_state, momentum_values, momentum_weights
from metaopt_lens.interventions._change import Change
from metaopt_lens.interventions._heads import Heads, head_mask
from metaopt_lens.interventions._pipeline import Staged
from metaopt_lens.interventions._sight import Sight
from metaopt_lens.models import AddsMomentum, Hook, HostPass, Late, LensModel


@dataclass(frozen=True, eq=False)
class MomentumAttention(Staged):
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

        Args:
            model: a wrapped model.

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

    def change(self, model: LensModel) -> Change:
        """The moving average, as what is added to z.

        Args:
            model: a wrapped model.

        Raises:
            OptionError, HeadError: see `etas`.
        """
        eta = self.etas(model)

        def add(model: LensModel, sight: Sight) -> list[Hook]:
            return momentum_hooks(model, eta, sight)

        return Change(addition=add)


def momentum_hooks(model: LensModel, eta: Float[Tensor, "layer head"], sight: Sight) -> list[Hook]:
    """Hooks that add the moving average of every layer whose eta is not 0 (or is being learned).

    Values are read as they are after all other hooks at them, also those attached later.
    """
    layers = [layer for layer in range(model.info.n_layers) if eta.requires_grad or bool((eta[layer] != 0).any())]
    return [hook for layer in layers for hook in _Layer(model, layer, eta[layer], sight).hooks()]


class _Layer:
    """One layer's average. Under a sliding cache, which forgets, it is remembered from pass to pass."""

    def __init__(
        self,
        model: LensModel,
        layer: int,
        eta: Float[Tensor, " head"],
        sight: Sight,
    ) -> None:
        self._model, self._layer, self._eta, self._sight = model, layer, eta, sight
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
        v = self._values
        assert v is not None
        self._values = None
        eta = self._eta.to(v.device)
        average = self._scanned(v, eta) if self._sight.is_plain else _of_what_is_seen(self._sight, self._layer, v, eta)
        return (z.to(average.dtype) + average).to(z.dtype)

    def _scanned(self, v: Tensor, eta: Tensor) -> Tensor:
        """The average where heads see all that was: in time linear in the number of tokens."""
        host_pass = self._sight.host_pass
        valid = None if bool(host_pass.valid.all()) else host_pass.valid.to(v.device)
        past = host_pass.past(self._layer)[1] if host_pass.n_past else None
        new_valid = None if valid is None else valid[:, host_pass.n_past :]
        state = None
        if host_pass.n_past:
            state = self._past_state(host_pass, past, eta, valid)
        if self._forgets:
            after = momentum_state(v.detach(), eta.detach(), state=state, valid=new_valid)
            self._remembered = (host_pass.n_past + v.shape[1], v[:, -1].detach(), after.detach())
        return momentum_values(v, eta, state=state, valid=new_valid)

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


def _of_what_is_seen(sight: Sight, layer: int, v: Tensor, eta: Tensor) -> Float[Tensor, "batch dst head d_head"]:
    """The average over what each head sees, at the positions where it stands; nothing is renormalised."""
    seen = sight.sources(layer, v)
    return seen.weighted(momentum_weights(eta.to(seen.share), seen.dst_positions, seen.positions))
