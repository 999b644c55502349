"""The result of `decompose`: factors of every head's attention, and all parts computed from them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import FileFormatError, ModelMismatchError, OptionError, SpanError
from metaopt_lens._storage import load_result, save_result, write_text
from metaopt_lens._types import HeadRef, TokenSpan
from metaopt_lens.decomposition._frame import decomposition_frame
from metaopt_lens.decomposition._prompt_meta import prompt_from_meta, prompt_to_meta
from metaopt_lens.dual import (
    LinearParts,
    SoftmaxParts,
    linear_memory,
    linear_weights,
    momentum_weights,
    split_linear,
    split_softmax,
    weighted_values,
)
from metaopt_lens.models import AttentionModel, ModelInfo, wrap
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens import FactoredMatrix

Form = Literal["softmax", "linear"]
KIND = "decomposition"
_TENSORS = ("q", "pattern", "sink", "z", "prefix_k", "prefix_v", "query_k", "query_v", "window")
_OPTIONAL_TENSORS = ("z_zero_shot", "z_position_matched", "eta")


@dataclass(frozen=True, eq=False)
class Effects:
    """Where the change from zero-shot to in-context comes from: ``total = direct + indirect + position``.

    Attributes:
        total: ``z_ICL - z_ZS``, against the plain zero-shot run (the paper's ICL update).
        direct: ``z_ICL - z_without``: attending to the demonstrations here and now.
        indirect: ``z_without - z_ZSm``: q, k, v changed by what earlier layers read from the demonstrations.
        position: ``z_ZSm - z_ZS``: the query standing further back.
        indirect_and_position: the last two together; the only one known when the position-matched run was not made.
    """

    total: Float[Tensor, "*dst layer head d_head"]
    direct: Float[Tensor, "*dst layer head d_head"]
    indirect_and_position: Float[Tensor, "*dst layer head d_head"]
    indirect: Float[Tensor, "*dst layer head d_head"] | None
    position: Float[Tensor, "*dst layer head d_head"] | None


@dataclass(frozen=True, eq=False)
class ResidualParts:
    """The split in the residual stream, after W_O. The bias b_O belongs to no head.

    ``zero_shot.sum(head) + meta_gradient.sum(head) + bias`` is the layer's attention output, with
    ``momentum.sum(head)`` under momentum attention.
    """

    zero_shot: Float[Tensor, "*dst layer head d_model"]
    meta_gradient: Float[Tensor, "*dst layer head d_model"]
    bias: Float[Tensor, "layer d_model"]
    momentum: Float[Tensor, "*dst layer head d_model"] | None = None

    @property
    def attention_output(self) -> Float[Tensor, "*dst layer d_model"]:
        """All heads and the bias together."""
        parts = self.zero_shot + self.meta_gradient
        return (parts if self.momentum is None else parts + self.momentum).sum(-2) + self.bias


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition:
    """Every head's output at one query token (or all of them), split into zero-shot and meta-gradient part.

    Parts have shape ``[layer, head, d_head]``; decomposed at all query positions, ``[dst, layer, head, d_head]``.

    Attributes:
        model: names and sizes of the model, and whether its weights were processed.
        prompt: the prompt as text; tokenized: its ids and spans.
        positions: the destinations, as indices into the prompt.
        q, z: query vectors as the scores see them and head outputs before W_O.
        pattern: attention probabilities over the prompt's tokens; sink: probability of the attention sink.
        prefix_k, prefix_v, query_k, query_v: keys (as the scores see them) and values of S and D, and of the query.
        window: per layer, how far back a query sees (the context window where there is no sliding window).
        z_zero_shot, z_position_matched: head outputs of the zero-shot runs, where they were made.
        provenance: versions and time.
        eta: of every head, under momentum attention; z then has a third part, `momentum`.
        source: the wrapped model, for W_O; None after loading (see `with_model`).
    """

    model: ModelInfo
    prompt: ICLPrompt
    tokenized: TokenizedPrompt
    positions: tuple[int, ...]
    keep_position_axis: bool
    q: Float[Tensor, "dst layer head d_head"]
    pattern: Float[Tensor, "dst layer head src"]
    sink: Float[Tensor, "dst layer head"]
    z: Float[Tensor, "dst layer head d_head"]
    prefix_k: Float[Tensor, "layer prefix kv_head d_head"]
    prefix_v: Float[Tensor, "layer prefix kv_head d_head"]
    query_k: Float[Tensor, "layer pos kv_head d_head"]
    query_v: Float[Tensor, "layer pos kv_head d_head"]
    window: Int[Tensor, " layer"]
    z_zero_shot: Float[Tensor, "dst layer head d_head"] | None
    z_position_matched: Float[Tensor, "dst layer head d_head"] | None
    provenance: dict[str, Any]
    eta: Float[Tensor, "layer head"] | None = None
    source: AttentionModel | None = field(default=None, compare=False)

    # ---- the split ----------------------------------------------------------------------------------------------

    @cached_property
    def softmax(self) -> SoftmaxParts:
        """The exact form: nothing relaxed, ``zero_shot + meta_gradient`` is the model's z (less `momentum`, if on)."""
        parts = split_softmax(
            rearrange(self.pattern, "dst layer head src -> layer head dst src"),
            self.v,
            self.demonstrations,
            sink=rearrange(self.sink, "dst layer head -> layer head dst"),
        )
        return SoftmaxParts(**{f.name: self._dst_first(getattr(parts, f.name)) for f in dataclasses.fields(parts)})

    @cached_property
    def linear(self) -> LinearParts:
        """The relaxed form: ``W_ZSL q`` and ``dW_ICL q`` (arXiv:2212.10559, eq. 7-10)."""
        zero_shot, meta_gradient = [], []
        for layer, visible in enumerate(self.visible):
            parts = split_linear(self.q[:, layer], self.k_of(layer), self.v_of(layer), visible, self.demonstrations)
            zero_shot.append(parts.zero_shot)
            meta_gradient.append(parts.meta_gradient)
        return LinearParts(
            zero_shot=self._dst_first(torch.stack(zero_shot)),
            meta_gradient=self._dst_first(torch.stack(meta_gradient)),
        )

    @property
    def fidelity(self) -> Float[Tensor, "*dst layer head"]:
        """How good the relaxation is: cosine between ``F(q)`` and the head's z (0 where either vanishes).

        z without `momentum`, which is no part of what is relaxed.
        """
        z = self._squeeze(self.z).to(self.linear.total)
        return torch.nn.functional.cosine_similarity(self.linear.total, z - self.momentum.to(z), dim=-1)

    @cached_property
    def effects(self) -> Effects:
        """Direct, indirect and position effect against the real zero-shot runs.

        Raises:
            OptionError: no zero-shot run was made.
        """
        if self.z_zero_shot is None:
            raise OptionError("no zero-shot run was made: decompose with zero_shot_runs='both' or 'plain'.")
        # The average is a sum: D's share is taken out and nothing is renormalised.
        without = self.softmax.without_demos + self.momentum - self.momentum_meta_gradient
        unseen = (self.softmax.mass[..., None] == 0) & (self.momentum_meta_gradient == 0)
        z, plain = (self._squeeze(t).to(without) for t in (self.z, self.z_zero_shot))
        direct = torch.where(unseen, 0.0, z - without)
        rest = z - plain - direct
        indirect = position = None
        if self.z_position_matched is not None:
            matched = self._squeeze(self.z_position_matched).to(without)
            indirect, position = z - direct - matched, matched - plain
        return Effects(total=z - plain, direct=direct, indirect_and_position=rest, indirect=indirect, position=position)

    # ---- momentum -----------------------------------------------------------------------------------------------

    @cached_property
    def momentum(self) -> Float[Tensor, "*dst layer head d_head"]:
        """The moving average of past values, ``sum_{i<t} eta^(t-i) v_i``: ``z = zero_shot + meta_gradient + momentum``.

        0 without momentum attention.
        """
        return self._momentum_part(TokenSpan(0, self.tokenized.n_tokens))

    @cached_property
    def momentum_meta_gradient(self) -> Float[Tensor, "*dst layer head d_head"]:
        """The demonstrations' share of `momentum`; a plain sum, which `without_demos` knows nothing of."""
        return self._momentum_part(self.demonstrations)

    def momentum_per_demo(self) -> Float[Tensor, "*dst layer head demo d_head"]:
        """`momentum_meta_gradient` split over the demonstrations, to which it sums."""
        return torch.stack([self._momentum_part(span) for span in self.tokenized.demos], dim=-2)

    def _momentum_part(self, span: TokenSpan) -> Tensor:
        if self.eta is None:
            return self.softmax.zero_shot.new_zeros(()).expand_as(self.softmax.zero_shot)  # a view: costs no memory
        eta = self.eta.to(self.softmax.zero_shot)
        dst = torch.tensor(self.positions, device=eta.device)
        src = torch.arange(span.start, span.stop, device=eta.device)
        per_layer = [
            weighted_values(momentum_weights(eta[layer], dst, src), self.v_of(layer)[span.slice])
            for layer in range(self.model.n_layers)
        ]
        return self._dst_first(torch.stack(per_layer))

    # ---- finer splits -------------------------------------------------------------------------------------------

    def per_demo(self, form: Form = "softmax") -> Float[Tensor, "*dst layer head demo d_head"]:
        """The meta-gradient split over the demonstrations (each with its separator); sums to `meta_gradient`."""
        return torch.stack([self._part(form, span) for span in self.tokenized.demos], dim=-2)

    def per_token(self, layer: int, head: int, form: Form = "softmax") -> Float[Tensor, "*dst src d_head"]:
        """One head's output split over all source tokens; sums to `meta_gradient` over D, to `zero_shot` elsewhere."""
        self._check_head(layer, head)
        weights = self._weights(form, layer)[head]
        group = self.model.n_heads // self.model.n_kv_heads
        parts = weights[..., None] * self.v_of(layer)[:, head // group].to(weights)
        return self._squeeze(parts)

    def token_shares(self, layer: int, head: int, form: Form = "softmax") -> Float[Tensor, "*dst src"]:
        """Signed share of every token in the head's meta-gradient: its part projected on the whole, sums to 1 over D.

        0 outside D, and everywhere if the meta-gradient vanishes.
        """
        parts = self.per_token(layer, head, form)
        inside = torch.zeros(parts.shape[-2], dtype=torch.bool, device=parts.device)
        inside[self.demonstrations.slice] = True
        whole = parts[..., inside, :].sum(-2, keepdim=True)
        shares = (parts * whole).sum(-1) / whole.square().sum(-1).clamp_min(torch.finfo(parts.dtype).tiny)
        return shares.masked_fill(~inside, 0.0)

    @property
    def residual(self) -> ResidualParts:
        """Exact parts in the residual stream, through W_O.

        Raises:
            ModelMismatchError: the result was loaded from a file; give it its model with `with_model` first.
        """
        model = self._source("the parts in the residual stream")
        zero_shot = torch.stack([self._through_w_o(self.softmax.zero_shot, i) for i in range(model.info.n_layers)], -3)
        meta = torch.stack([self._through_w_o(self.softmax.meta_gradient, i) for i in range(model.info.n_layers)], -3)
        biases = [model.b_o(layer) for layer in range(model.info.n_layers)]
        none = zero_shot.new_zeros(zero_shot.shape[-1])
        bias = torch.stack([none if b is None else self._weight(b, zero_shot) for b in biases])
        momentum = None
        if self.eta is not None:
            momentum = torch.stack([self._through_w_o(self.momentum, i) for i in range(model.info.n_layers)], -3)
        return ResidualParts(zero_shot=zero_shot, meta_gradient=meta, bias=bias, momentum=momentum)

    def residual_per_token(self, layer: int, head: int, form: Form = "softmax") -> Float[Tensor, "*dst src d_model"]:
        """`per_token` through W_O."""
        parts = self.per_token(layer, head, form)
        w_o = self._source("the parts in the residual stream").w_o(layer)[head]
        return parts @ self._weight(w_o, parts)

    # ---- the matrices -------------------------------------------------------------------------------------------

    def w_zsl(self, layer: int, head: int, *, position: int | None = None) -> FactoredMatrix:
        """``W_ZSL = sum_{i in Z} v_i (x) k_i`` over the visible tokens of Z, factored; ``.AB @ q``."""
        return self._memory(layer, head, position, demos=False)

    def delta_w_icl(self, layer: int, head: int, *, position: int | None = None) -> FactoredMatrix:
        """``dW_ICL = sum_{i in D} v_i (x) k_i`` over the visible tokens of D, factored; ``.AB @ q``.

        Rank at most ``min(d_head, demonstration tokens)``. In a layer whose sliding window hides part of D
        (`demos_fully_visible`) it depends on the position.
        """
        return self._memory(layer, head, position, demos=True)

    @property
    def visible(self) -> Bool[Tensor, "layer dst src"]:
        """Which sources each destination sees: causal, and inside the layer's sliding window."""
        device = self.pattern.device
        dst = torch.tensor(self.positions, device=device)
        distance = dst[:, None] - torch.arange(self.tokenized.n_tokens, device=device)
        return (distance >= 0) & (distance < self.window.to(device)[:, None, None])

    @property
    def demos_fully_visible(self) -> tuple[bool, ...]:
        """Per layer, whether every destination sees all of D, so that dW_ICL does not depend on the query."""
        return tuple(bool(v) for v in self.visible[:, :, self.demonstrations.slice].all(-1).all(-1))

    # ---- reading, storing, showing ------------------------------------------------------------------------------

    @property
    def demonstrations(self) -> TokenSpan:
        """D, as a span of the prompt's tokens."""
        return self.tokenized.demonstrations

    @property
    def v(self) -> Float[Tensor, "layer src kv_head d_head"]:
        """Values of all tokens."""
        return torch.cat([self.prefix_v, self.query_v], dim=1)

    def k_of(self, layer: int) -> Float[Tensor, "src kv_head d_head"]:
        """Keys of all tokens in a layer, as the scores see them."""
        return torch.cat([self.prefix_k[layer], self.query_k[layer]])

    def v_of(self, layer: int) -> Float[Tensor, "src kv_head d_head"]:
        """Values of all tokens in a layer."""
        return torch.cat([self.prefix_v[layer], self.query_v[layer]])

    def heads(self, top: int | None = None) -> list[HeadRef]:
        """Heads by the size of their meta-gradient relative to their output, largest first."""
        z = self._squeeze(self.z).to(self.softmax.meta_gradient)
        ratio = self.softmax.meta_gradient.norm(dim=-1) / z.norm(dim=-1).clamp_min(torch.finfo(z.dtype).tiny)
        ratio = ratio.reshape(-1, *ratio.shape[-2:]).mean(0).detach()
        order = ratio.flatten().argsort(descending=True, stable=True)[:top].tolist()
        return [HeadRef(index // self.model.n_heads, index % self.model.n_heads) for index in order]

    def with_model(self, model: Any) -> Decomposition:
        """The same result with a model to take W_O from, after `load`.

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
        """A plotly layer x head map of a column of `to_frame` (mass, norms, fidelity, ...)."""
        from metaopt_lens.viz import head_map

        return head_map(self, value)

    def attention_view(self, heads: Sequence[str | HeadRef | tuple[int, int]] | None = None) -> Any:
        """circuitsvis: attention of chosen heads over the tokens, demonstrations marked (default: the strongest)."""
        from metaopt_lens.viz import attention_view

        return attention_view(self, heads)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path.safetensors`` and ``path.json``; returns the latter."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {name: t for name in _OPTIONAL_TENSORS if (t := getattr(self, name)) is not None}
        meta = {
            "model": dataclasses.asdict(self.model),
            "prompt": prompt_to_meta(self.prompt, self.tokenized),
            "positions": list(self.positions),
            "keep_position_axis": self.keep_position_axis,
            "provenance": self.provenance,
        }
        return save_result(path, kind=KIND, tensors=tensors, meta=meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: Any | None = None) -> Decomposition:
        """Read what `save` wrote.

        Raises:
            FileFormatError: a file is missing, damaged, or holds something else.
        """
        tensors, meta = load_result(path, kind=KIND)
        try:
            info = meta["model"] | {"processing": tuple(meta["model"]["processing"])}
            prompt, tokenized = prompt_from_meta(meta["prompt"])
            stored: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            stored |= {name: tensors.get(name) for name in _OPTIONAL_TENSORS}
            loaded = cls(
                model=ModelInfo(**info),
                prompt=prompt,
                tokenized=tokenized,
                positions=tuple(meta["positions"]),
                keep_position_axis=meta["keep_position_axis"],
                provenance=meta["provenance"],
                **stored,
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} is not a complete {KIND}: {error!r}.") from None
        return loaded if model is None else loaded.with_model(model)

    def __repr__(self) -> str:
        m, t = self.model, self.tokenized
        weights = f"; weights with {' and '.join(m.processing)}" if m.processing else ""
        where = "all query positions" if self.keep_position_axis else f"position {self.positions[0]}"
        mass = self.softmax.mass.detach().reshape(-1, m.n_layers, m.n_heads).mean(0)
        fidelity = self.fidelity.detach().reshape(-1, m.n_layers, m.n_heads).mean(0)
        lines = [
            f"Decomposition of {m.name} ({m.n_layers} layers x {m.n_heads} heads{weights}) at {where} "
            f"({t.tokens[self.positions[-1]]!r})",
            f"  {len(t.demos)} demonstrations in {len(t.demonstrations)} tokens, "
            f"query of {len(t.query)} tokens, {len(t.prefix)} before",
            f"  attention mass on the demonstrations: mean {mass.mean():.3f}, highest {mass.max():.3f}",
            f"  linear relaxation: mean cosine {fidelity.mean():.3f} to the exact output",
            "  largest meta-gradient share: " + ", ".join(str(h) for h in self.heads(5)),
        ]
        if self.eta is not None:
            share = float(self.momentum.detach().norm() / self._squeeze(self.z).detach().norm())
            highest = float(self.eta.detach().max())
            lines.append(f"  momentum attention (eta up to {highest:.3g}): norm {share:.3f} of z's")
        return "\n".join(lines)

    # ---- helpers ------------------------------------------------------------------------------------------------

    def _squeeze(self, tensor: Tensor) -> Tensor:
        """Drop the leading destination axis unless all positions were asked for."""
        return tensor if self.keep_position_axis else tensor[0]

    def _dst_first(self, tensor: Tensor) -> Tensor:
        """``[layer, dst, head, ...] -> [dst, layer, head, ...]``, then `_squeeze`."""
        return self._squeeze(tensor.transpose(0, 1))

    def _weights(self, form: Form, layer: int) -> Float[Tensor, "head dst src"]:
        if form == "softmax":
            return rearrange(self.pattern[:, layer], "dst head src -> head dst src")
        if form == "linear":
            return linear_weights(self.q[:, layer], self.k_of(layer), self.visible[layer])
        raise OptionError(f"form must be 'softmax' or 'linear', got {form!r}.")

    def _part(self, form: Form, span: TokenSpan) -> Tensor:
        per_layer = [
            weighted_values(self._weights(form, layer)[..., span.slice], self.v_of(layer)[span.slice])
            for layer in range(self.model.n_layers)
        ]
        return self._dst_first(torch.stack(per_layer))

    def _memory(self, layer: int, head: int, position: int | None, *, demos: bool) -> FactoredMatrix:
        self._check_head(layer, head)
        at = self.positions[-1] if position is None else position
        if at not in self.positions:
            raise SpanError(f"position {at} was not decomposed; this result holds {list(self.positions)}.")
        inside = torch.zeros(self.tokenized.n_tokens, dtype=torch.bool, device=self.pattern.device)
        inside[self.demonstrations.slice] = True
        chosen = self.visible[layer, self.positions.index(at)] & (inside if demos else ~inside)
        kv = head // (self.model.n_heads // self.model.n_kv_heads)
        return linear_memory(self.k_of(layer)[chosen, kv], self.v_of(layer)[chosen, kv])

    def _check_head(self, layer: int, head: int) -> None:
        HeadRef(layer, head).check(self.model.n_layers, self.model.n_heads)

    def _through_w_o(self, parts: Tensor, layer: int) -> Tensor:
        assert self.source is not None
        w_o = self._weight(self.source.w_o(layer), parts)
        return torch.einsum("...hd,hdm->...hm", parts[..., layer, :, :], w_o)

    def _weight(self, weight: Tensor, like: Tensor) -> Tensor:
        """A weight of the model, with a graph only if this result was made with one."""
        return (weight if self.z.requires_grad else weight.detach()).to(like)

    def _source(self, what: str) -> AttentionModel:
        if self.source is None:
            raise ModelMismatchError(f"{what} need the model's W_O: call with_model(model) on the loaded result first.")
        return self.source


@dataclass(frozen=True)
class DecompositionSet(Sequence[Decomposition]):
    """Decompositions of several prompts, in order; those with the same demonstrations share their keys and values."""

    items: tuple[Decomposition, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return DecompositionSet(self.items[index]) if isinstance(index, slice) else self.items[index]

    def __iter__(self) -> Iterator[Decomposition]:
        return iter(self.items)

    def to_frame(self) -> pd.DataFrame:
        """All tables below each other, with a `query` column that counts the prompts."""
        import pandas as pd

        return pd.concat(
            [item.to_frame().assign(query=index) for index, item in enumerate(self.items)], ignore_index=True
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write one pair of files per decomposition and an ``index.json``; returns the latter."""
        base = Path(folder)
        names = [f"{index:05d}" for index in range(len(self.items))]
        for name, item in zip(names, self.items, strict=True):
            item.save(base / name)
        return write_text(base / "index.json", json.dumps({"kind": f"{KIND} set", "items": names}) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, model: Any | None = None) -> DecompositionSet:
        """Read what `save` wrote.

        Raises:
            FileFormatError: a file is missing, damaged, or holds something else.
        """
        index = Path(folder) / "index.json"
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["items"]
        except (OSError, ValueError, KeyError, TypeError):
            raise FileFormatError(f"{index} is not the index of a saved set of decompositions.") from None
        return cls(tuple(Decomposition.load(Path(folder) / name, model=model) for name in names))

    def __repr__(self) -> str:
        return f"DecompositionSet of {len(self.items)} prompts, the first:\n{self.items[0]!r}"
