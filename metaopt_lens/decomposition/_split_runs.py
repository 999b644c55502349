"""What `decompose` finds from the runs alone: every head's output, split where a reader looks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._codec import Stored, stored_as
from metaopt_lens._errors import OptionError, SpanError
from metaopt_lens._types import HeadRef, TokenSpan
from metaopt_lens.decomposition._direct_logits import at_one_destination
from metaopt_lens.decomposition._effects import Effects, effects_of
from metaopt_lens.dual import LinearParts, SoftmaxParts
from metaopt_lens.models import ModelInfo
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt
from metaopt_lens.runs import (
    Run,
    Runs,
    StoredRuns,
    delta_w_icl,
    linear_parts,
    momentum_part,
    part_of,
    run_linear_weights,
    softmax_parts,
    softmax_weights,
    w_zsl,
)

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix

Form = Literal["softmax", "linear"]
Parts = TypeVar("Parts", SoftmaxParts, LinearParts, Effects)
_WEIGHTS = {"softmax": softmax_weights, "linear": run_linear_weights}


@dataclass(frozen=True, eq=False, repr=False)
class SplitRuns(Stored):
    """One prompt's runs and the split of every head's output, computed from them: no weight of the model is read.

    Attributes:
        prompt: the prompt as text.
        runs: in context and, where they were made, zero-shot.
        keep_position_axis: whether all positions of the query were asked for.
    """

    prompt: ICLPrompt
    runs: Runs = field(metadata=stored_as(StoredRuns))
    keep_position_axis: bool

    # ---- what was recorded --------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelInfo:
        """Names and sizes of the model, and whether its weights were processed."""
        return self.runs.icl.model

    @property
    def tokenized(self) -> TokenizedPrompt:
        """The prompt's ids and spans."""
        return self.runs.icl.tokens

    @property
    def demonstrations(self) -> TokenSpan:
        """D, as a span of the prompt's tokens."""
        return self.tokenized.demonstrations

    @property
    def positions(self) -> tuple[int, ...]:
        """The destinations, as indices into the prompt."""
        return self.runs.icl.destinations

    @property
    def q(self) -> Float[Tensor, "*dst layer head d_head"]:
        """Queries as the scores see them."""
        return self._squeeze(self.runs.icl.q)

    @property
    def z(self) -> Float[Tensor, "*dst layer head d_head"]:
        """Head outputs before W_O, in context."""
        return self._squeeze(self.runs.icl.z)

    @property
    def pattern(self) -> Float[Tensor, "*dst layer head src"]:
        """Attention probabilities over the prompt's tokens."""
        return self._squeeze(self.runs.icl.pattern)

    @property
    def sink(self) -> Float[Tensor, "*dst layer head"]:
        """Probability of the attention sink (0 without sinks)."""
        return self._squeeze(self.runs.icl.sink)

    @property
    def z_zero_shot(self) -> Float[Tensor, "*dst layer head d_head"] | None:
        """Head outputs of the zero-shot run, if it was made."""
        return self._squeeze(self.runs.zs.z) if "zs" in self.runs else None

    @property
    def z_position_matched(self) -> Float[Tensor, "*dst layer head d_head"] | None:
        """Head outputs of the position-matched zero-shot run, if it was made."""
        return self._squeeze(self.runs.zs_matched.z) if "zs_matched" in self.runs else None

    @property
    def eta(self) -> Float[Tensor, "layer head"] | None:
        """eta of every head, under momentum attention; z then has a third part, `momentum`."""
        return self.runs.icl.eta

    # ---- the split ----------------------------------------------------------------------------------------------

    @cached_property
    def softmax(self) -> SoftmaxParts:
        """The exact form: nothing relaxed, ``zero_shot + meta_gradient`` is the model's z (less `momentum`, if on)."""
        return self._squeezed(self._softmax)

    @cached_property
    def _softmax(self) -> SoftmaxParts:
        """`softmax` at every destination."""
        return softmax_parts(self.runs.icl)

    @cached_property
    def linear(self) -> LinearParts:
        """The relaxed form: ``W_ZSL q`` and ``dW_ICL q`` (arXiv:2212.10559, eq. 7-10)."""
        return self._squeezed(linear_parts(self.runs.icl))

    @property
    def fidelity(self) -> Float[Tensor, "*dst layer head"]:
        """How good the relaxation is: cosine between ``F(q)`` and the head's z (0 where either vanishes).

        z without `momentum`, which is no part of what is relaxed.
        """
        z = self.z.to(self.linear.total)
        return torch.nn.functional.cosine_similarity(self.linear.total, z - self.momentum.to(z), dim=-1)

    @cached_property
    def effects(self) -> Effects:
        """Direct, indirect and position effect against the real zero-shot runs.

        Raises:
            OptionError: no zero-shot run was made.
        """
        return self._squeezed(effects_of(self.runs, self._softmax))

    # ---- momentum -----------------------------------------------------------------------------------------------

    @cached_property
    def momentum(self) -> Float[Tensor, "*dst layer head d_head"]:
        """The moving average of past values, ``sum_{i<t} eta^(t-i) v_i``: ``z = zero_shot + meta_gradient + momentum``.

        0 without momentum attention.
        """
        return self._squeeze(momentum_part(self.runs.icl, TokenSpan(0, self.tokenized.n_tokens)))

    @cached_property
    def momentum_meta_gradient(self) -> Float[Tensor, "*dst layer head d_head"]:
        """The demonstrations' share of `momentum`; a plain sum, which `without_demos` knows nothing of."""
        return self._squeeze(momentum_part(self.runs.icl, self.demonstrations))

    def momentum_per_demo(self) -> Float[Tensor, "*dst layer head demo d_head"]:
        """`momentum_meta_gradient` split over the demonstrations, to which it sums."""
        return self._per_demo(lambda span: momentum_part(self.runs.icl, span))

    # ---- finer splits -------------------------------------------------------------------------------------------

    def per_demo(self, form: Form = "softmax") -> Float[Tensor, "*dst layer head demo d_head"]:
        """The meta-gradient split over the demonstrations (each with its separator); sums to `meta_gradient`.

        Args:
            form: ``"softmax"`` for the exact split, ``"linear"`` for the relaxed one.
        """
        return self._per_demo(lambda span: part_of(self.runs.icl, _weights(form), span))

    def per_token(self, layer: int, head: int, form: Form = "softmax") -> Float[Tensor, "*dst src d_head"]:
        """One head's output split over all source tokens; sums to `meta_gradient` over D, to `zero_shot` elsewhere.

        Args:
            layer: counted from 0.
            head: counted from 0.
            form: ``"softmax"`` for the exact split, ``"linear"`` for the relaxed one.
        """
        self._check_head(layer, head)
        weights = _weights(form)(self.runs.icl, layer)[head]
        parts = weights[..., None] * self.runs.icl.v_of(layer)[:, self._kv(head)].to(weights)
        return self._squeeze(parts)

    def token_shares(self, layer: int, head: int, form: Form = "softmax") -> Float[Tensor, "*dst src"]:
        """Signed share of every token in the head's meta-gradient: its part projected on the whole, sums to 1 over D.

        0 outside D, and everywhere if the meta-gradient vanishes.

        Args:
            layer: counted from 0.
            head: counted from 0.
            form: ``"softmax"`` for the exact split, ``"linear"`` for the relaxed one.
        """
        parts = self.per_token(layer, head, form)
        inside = self.runs.icl.in_demos
        whole = parts[..., inside, :].sum(-2, keepdim=True)
        shares = (parts * whole).sum(-1) / whole.square().sum(-1).clamp_min(torch.finfo(parts.dtype).tiny)
        return shares.masked_fill(~inside, 0.0)

    # ---- the matrices -------------------------------------------------------------------------------------------

    def w_zsl(self, layer: int, head: int, *, position: int | None = None) -> FactoredMatrix:
        """``W_ZSL = sum_{i in Z} v_i (x) k_i`` over the visible tokens of Z, factored; ``.AB @ q``.

        Args:
            layer: counted from 0.
            head: counted from 0.
            position: which position of a result of several; None where there is one.
        """
        self._check_head(layer, head)
        return w_zsl(self.runs.icl, layer, dst=self._dst(position))[self._kv(head)]

    def delta_w_icl(self, layer: int, head: int, *, position: int | None = None) -> FactoredMatrix:
        """``dW_ICL = sum_{i in D} v_i (x) k_i`` over the visible tokens of D, factored; ``.AB @ q``.

        Rank at most ``min(d_head, demonstration tokens)``. In a layer whose sliding window hides part of D
        (`demos_fully_visible`) it depends on the position.

        Args:
            layer: counted from 0.
            head: counted from 0.
            position: which position of a result of several; None where there is one.
        """
        self._check_head(layer, head)
        return delta_w_icl(self.runs.icl, layer, dst=self._dst(position))[self._kv(head)]

    @property
    def demos_fully_visible(self) -> tuple[bool, ...]:
        """Per layer, whether every destination sees all of D, so that dW_ICL does not depend on the query."""
        return tuple(bool(v) for v in self.runs.icl.visible[:, :, self.demonstrations.slice].all(-1).all(-1))

    # ---- helpers ------------------------------------------------------------------------------------------------

    def _squeeze(self, tensor: Tensor) -> Tensor:
        """Drop the leading destination axis unless all positions were asked for."""
        return tensor if self.keep_position_axis else tensor[0]

    def _squeezed(self, parts: Parts) -> Parts:
        """`_squeeze` for every tensor of a result."""
        found: dict[str, Any] = {f.name: getattr(parts, f.name) for f in dataclasses.fields(parts)}
        squeezed: dict[str, Any] = {name: None if t is None else self._squeeze(t) for name, t in found.items()}
        return type(parts)(**squeezed)

    def _per_demo(self, part: Callable[[TokenSpan], Tensor]) -> Tensor:
        return torch.stack([self._squeeze(part(span)) for span in self.tokenized.demos], dim=-2)

    def _dst(self, position: int | None) -> int:
        """Which destination a position is."""
        at = self.positions[-1] if position is None else position
        if at not in self.positions:
            raise SpanError(f"position {at} was not decomposed; this result holds {list(self.positions)}.")
        return self.positions.index(at)

    def _one(self, position: int | None) -> Run:
        """The in-context run at one destination."""
        return at_one_destination(self.runs.icl, self._dst(position))

    def _kv(self, head: int) -> int:
        return head // (self.model.n_heads // self.model.n_kv_heads)

    def _check_head(self, layer: int, head: int) -> None:
        HeadRef(layer, head).check(self.model.n_layers, self.model.n_heads)


def _weights(form: Form) -> Callable[[Run, int], Tensor]:
    if form not in _WEIGHTS:
        raise OptionError(f"form must be 'softmax' or 'linear', got {form!r}.")
    return _WEIGHTS[form]
