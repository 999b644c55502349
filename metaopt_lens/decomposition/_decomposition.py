"""The result of `decompose`: one prompt's runs, and the split computed from them where a reader looks for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._codec import NOT_STORED, Stored, stored_as
from metaopt_lens._errors import ModelMismatchError, OptionError, SpanError
from metaopt_lens._plots import draw
from metaopt_lens._types import HeadRef, TokenSpan
from metaopt_lens.decomposition._answer_tokens import Answer
from metaopt_lens.decomposition._decomposition_frame import decomposition_frame, describe
from metaopt_lens.decomposition._direct_logits import at_one_destination
from metaopt_lens.decomposition._effects import Effects, ResidualParts, effects_of
from metaopt_lens.decomposition._lens_words import LensMaps, LensWords, UpdateDirection
from metaopt_lens.decomposition._logit_contributions import LogitContributions
from metaopt_lens.decomposition._reading import read_logits, read_part, read_update
from metaopt_lens.dual import LinearParts, SoftmaxParts
from metaopt_lens.models import LensModel, ModelInfo, wrap
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt
from metaopt_lens.runs import (
    LabelPrediction,
    Run,
    Runs,
    StoredRuns,
    delta_w_icl,
    linear_parts,
    momentum_part,
    output_bias,
    part_of,
    predict_labels,
    rank_heads,
    run_linear_weights,
    softmax_parts,
    softmax_weights,
    through_w_o,
    w_zsl,
)

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens import FactoredMatrix

Form = Literal["softmax", "linear"]
Parts = TypeVar("Parts", SoftmaxParts, LinearParts, Effects)
_WEIGHTS = {"softmax": softmax_weights, "linear": run_linear_weights}


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Stored):
    """Every head's output at one query token (or all of them), split into zero-shot and meta-gradient part.

    Everything asked of the decomposition has one shape: ``[layer, head, ...]`` at one position; decomposed at all query
    positions, ``[dst, layer, head, ...]``. The recorded `runs` always have their destination axis.

    Attributes:
        prompt: the prompt as text.
        runs: in context (``runs.icl``) and, where they were made, zero-shot (``runs.zs``, ``runs.zs_matched``).
        keep_position_axis: whether all positions of the query were asked for.
        provenance: versions and time.
        stored_strength: `strength`, of a loaded result.
        source: the wrapped model, for W_O; None after loading (see `with_model`).
    """

    kind: ClassVar[str] = "decomposition"

    prompt: ICLPrompt
    runs: Runs = field(metadata=stored_as(StoredRuns))
    keep_position_axis: bool
    provenance: dict[str, Any]
    stored_strength: Float[Tensor, "*dst layer head"] | None = None
    source: LensModel | None = field(default=None, metadata=NOT_STORED)

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

    @property
    def residual(self) -> ResidualParts:
        """Exact parts in the residual stream, through W_O.

        Raises:
            ModelMismatchError: the result was loaded from a file; give it its model with `with_model` first.
        """
        model = self.required_source("the parts in the residual stream")
        zero_shot = through_w_o(model, self.softmax.zero_shot)
        return ResidualParts(
            zero_shot=zero_shot,
            meta_gradient=through_w_o(model, self.softmax.meta_gradient),
            bias=output_bias(model, zero_shot),
            momentum=None if self.eta is None else through_w_o(model, self.momentum),
        )

    def residual_per_token(self, layer: int, head: int, form: Form = "softmax") -> Float[Tensor, "*dst src d_model"]:
        """`per_token` through W_O.

        Args:
            layer: counted from 0.
            head: counted from 0.
            form: ``"softmax"`` for the exact split, ``"linear"`` for the relaxed one.
        """
        parts = self.per_token(layer, head, form)
        w_o = self.required_source("the parts in the residual stream").w_o(layer)[head]
        return parts @ (w_o if parts.requires_grad else w_o.detach()).to(parts)

    def at_last_position(self) -> Decomposition:
        """The same result at the last of its positions alone, without their axis."""
        if not self.keep_position_axis:
            return self
        runs = Runs({setting: at_one_destination(run, -1) for setting, run in self.runs.items()})
        return dataclasses.replace(self, runs=runs, keep_position_axis=False, stored_strength=None)

    # ---- what the parts say -------------------------------------------------------------------------------------

    def logits(
        self,
        answer: Answer | None = None,
        *,
        versus: Answer | Sequence[Answer] | None = None,
        position: int | None = None,
    ) -> LogitContributions:
        """What every part of every head adds to the logit of an answer (docs/theory.md, section 8).

        Args:
            answer: a word as the prompt's template writes a label, a token id, or several token ids; None for the
                prompt's label. Several tokens are read one by one, each behind those before it.
            versus: whose mean logit is subtracted: a word, or a list of them; None for the prompt's other candidates
                (those with another first token), ``()`` for nothing.
            position: where to read, if all positions were decomposed; the last by default.

        Returns:
            `LogitContributions`, which sum to the model's logit.

        Raises:
            PromptError: an answer of no token, or with the same first token as a rival.
            OptionError: an answer of several tokens anywhere but at the prompt's end, or an unknown token id.
            ModelMismatchError: the result was loaded from a file; give it its model with `with_model` first.
            UnsupportedModelError: the contributions do not add up to the model's logit.
        """
        return read_logits(self.required_source("logits"), self.prompt, self._one(position), answer, versus)

    def lens(
        self,
        head: str | HeadRef | tuple[int, int] | None = None,
        part: str = "meta_gradient",
        *,
        layer: int | None = None,
        demo: int | None = None,
        top: int = 10,
        maps: LensMaps | None = None,
        position: int | None = None,
    ) -> LensWords:
        """The words that a part promotes and suppresses (docs/theory.md, section 8).

        Args:
            head: ``"L3H7"`` or ``(3, 7)``.
            part: ``"meta_gradient"``, ``"zero_shot"`` or ``"z"`` of the exact form, ``"linear_meta_gradient"`` (dW_ICL
                q) or ``"linear_zero_shot"`` (W_ZSL q) of the relaxed one; for a layer also ``"mlp"``.
            layer: all heads of a layer together, instead of a head.
            demo: one demonstration's share of the meta-gradient.
            top: how many words on either side.
            maps: a map ``[d_model, d_model]`` per layer, as tuned and Jacobian lenses have; None for the logit lens.
            position: where to read, if all positions were decomposed; the last by default.

        Raises:
            OptionError: a part or demonstration that does not exist, or a lens of another width.
            HeadError: a head or layer that the model does not have.
            ModelMismatchError: the result was loaded from a file; give it its model with `with_model` first.
        """
        model = self.required_source("words")
        return read_part(model, self._one(position), head, part, layer=layer, demo=demo, top=top, maps=maps)

    def lens_update(
        self, layer: int, head: int, *, k: int = 3, top: int = 10, maps: LensMaps | None = None
    ) -> tuple[UpdateDirection, ...]:
        """A head's whole update dW_ICL as words: its leading singular directions.

        The left ones are what it can write, read as words through W_O. The right ones are what it looks for in a query,
        in the space of rotated keys, which no unembedding reads: they are given as the demonstrations' tokens whose
        keys lie along them most.

        Args:
            layer: counted from 0.
            head: counted from 0.
            k: how many directions.
            top: how many words and tokens.
            maps: see `lens`.

        Raises:
            HeadError: a head that the model does not have.
            ModelMismatchError: the result was loaded from a file; give it its model with `with_model` first.
        """
        model = self.required_source("words")
        self._check_head(layer, head)
        return read_update(model, self._one(None), self.delta_w_icl(layer, head), layer, head, k=k, top=top, maps=maps)

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

    # ---- reading, storing, showing ------------------------------------------------------------------------------

    @cached_property
    def strength(self) -> Float[Tensor, "*dst layer head"]:
        """Norm of every head's meta-gradient in the residual stream, ``|meta_gradient W_O|``: the order of `heads`.

        Raises:
            ModelMismatchError: the result was loaded from a file that has no strengths; give it its model first.
        """
        if self.stored_strength is not None:
            return self.stored_strength
        norm: Tensor = through_w_o(self.required_source("the strengths of heads"), self.softmax.meta_gradient).norm(
            dim=-1
        )
        return norm

    def heads(self, top: int | None = None, *, by: Float[Tensor, "layer head"] | None = None) -> list[HeadRef]:
        """Heads in order of importance, largest first.

        Args:
            top: how many; all by default.
            by: a measured effect of every head (`HeadEffects.map`), which says more than any size. By default the size
                of the meta-gradient in the residual stream, `strength`, mean over positions. Its share of z ranks
                nothing: it is near 1 for many heads, whatever they do.
        """
        return rank_heads(mean_strength([self]) if by is None else by, top)

    def predict(self, *, labels: Sequence[str] | None = None) -> LabelPrediction:
        """What the model answered to this prompt, with and without its demonstrations (see `predict_labels`).

        Read from the recorded runs. Labels of several tokens, and others than the prompt's own, need further passes:
        the model is run as it is now, so ask for these inside the `intervene` that the result was made in.

        Args:
            labels: the candidates; by default the prompt's own or its demonstrations' labels, and the right label.

        Raises:
            ModelMismatchError: the result was loaded from a file; give it its model with `with_model` first.
            PromptError: two candidates with the same tokens.
        """
        source = self.required_source("predictions")
        return predict_labels(source, self.prompt, self.tokenized, labels=labels, runs=self.runs)

    def with_model(self, model: Any) -> Decomposition:
        """The same result with a model to take W_O from, after `load`.

        Args:
            model: `HookedTransformer`, `TransformerBridge` or a wrapped model.

        Raises:
            ModelMismatchError: the model has other sizes or another parametrisation.
        """
        wrapped = wrap(model)
        wrapped.check_same(self.model, "this decomposition")
        return dataclasses.replace(self, source=wrapped)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, one row per position, layer and head; norms are Euclidean, in units of z."""
        return decomposition_frame(self)

    def plot(self, value: str = "mass") -> Any:
        """A plotly layer x head map of a column of `to_frame` (mass, norms, fidelity, ...).

        Args:
            value: the column.
        """
        return draw(self, "plot", value)

    def attention_view(self, heads: Sequence[str | HeadRef | tuple[int, int]] | None = None) -> Any:
        """circuitsvis: attention of chosen heads over the tokens, demonstrations marked (default: the strongest).

        Args:
            heads: heads such as ``"L3H7"`` or ``(3, 7)``; None for the first four of `heads()`.
        """
        return draw(self, "attention_view", heads)

    def token_view(self, heads: Sequence[str | HeadRef | tuple[int, int]] | None = None, form: Form = "softmax") -> Any:
        """circuitsvis: demonstration tokens coloured by their share of a head's meta-gradient; see `token_shares`.

        Args:
            heads: heads such as ``"L3H7"`` or ``(3, 7)``; None for the first four of `heads()`.
            form: ``"softmax"`` for the exact split, ``"linear"`` for the relaxed one.
        """
        return draw(self, "token_view", heads, form)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path.safetensors`` and ``path.json``, with `strength` where it is known; returns the latter.

        Args:
            path: of either file, or without the ending.
        """
        known = self if self.source is None else dataclasses.replace(self, stored_strength=self.strength)
        return Stored.save(known, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: Any | None = None) -> Decomposition:
        """Read what `save` wrote.

        Args:
            path: of either file, or without the ending.
            model: see `with_model`; None for a result without W_O.

        Raises:
            FileFormatError: a file is missing, damaged, or holds something else.
        """
        loaded = super().load(path)
        return loaded if model is None else loaded.with_model(model)

    @classmethod
    def _refusal(cls, body: Mapping[str, Any]) -> str | None:
        """Files of 0.1 hold the prompt's tokens, and of the zero-shot runs z alone."""
        if "tokenized" not in body.get("prompt", {}):
            return None
        return (
            "was written by metaopt-lens 0.1, which kept the zero-shot runs' outputs but not the runs: "
            "decompose the prompt again."
        )

    def _repr_html_(self) -> str:
        """The compact view: what was found, then the text."""
        markup: str = draw(self, "compact")
        return markup

    def __repr__(self) -> str:
        return describe(self)

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

    def required_source(self, what: str) -> LensModel:
        """The model, for `what` that needs it.

        Args:
            what: what errors call that which needs the model.

        Raises:
            ModelMismatchError: the result was loaded from a file.
        """
        if self.source is None:
            raise ModelMismatchError(f"{what} need the model: call with_model(model) on the loaded result first.")
        return self.source


def _weights(form: Form) -> Callable[[Run, int], Tensor]:
    if form not in _WEIGHTS:
        raise OptionError(f"form must be 'softmax' or 'linear', got {form!r}.")
    return _WEIGHTS[form]


def mean_strength(results: Sequence[Decomposition]) -> Float[Tensor, "layer head"]:
    """Strength of every head, mean over results and positions.

    Args:
        results: decompositions on one model.
    """
    # [*dst layer head] -> [(result dst) layer head]
    return torch.cat([r.strength.detach().reshape(-1, *r.strength.shape[-2:]) for r in results]).mean(0)
