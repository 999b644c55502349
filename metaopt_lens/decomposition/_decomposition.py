"""The result of `decompose`: the split of one prompt's runs, and what it says with the model at hand."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._codec import NOT_STORED, Stored
from metaopt_lens._errors import ModelMismatchError
from metaopt_lens._plots import draw
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition._answer_tokens import Answer
from metaopt_lens.decomposition._decomposition_frame import decomposition_frame, describe
from metaopt_lens.decomposition._direct_logits import at_one_destination
from metaopt_lens.decomposition._effects import ResidualParts
from metaopt_lens.decomposition._lens_words import LensMaps, LensWords, UpdateDirection
from metaopt_lens.decomposition._logit_contributions import LogitContributions
from metaopt_lens.decomposition._reading import read_logits, read_part, read_update
from metaopt_lens.decomposition._split_runs import Form, SplitRuns
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.runs import LabelPrediction, Runs, output_bias, predict_labels, rank_heads, through_w_o

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(SplitRuns):
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

    provenance: dict[str, Any]
    stored_strength: Float[Tensor, "*dst layer head"] | None = None
    source: LensModel | None = field(default=None, metadata=NOT_STORED)

    # ---- through W_O --------------------------------------------------------------------------------------------

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


def mean_strength(results: Sequence[Decomposition]) -> Float[Tensor, "layer head"]:
    """Strength of every head, mean over results and positions.

    Args:
        results: decompositions on one model.
    """
    # [*dst layer head] -> [(result dst) layer head]
    return torch.cat([r.strength.detach().reshape(-1, *r.strength.shape[-2:]) for r in results]).mean(0)
