"""A weight update kept apart from the model: dW and db per layer and head, applied by hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._codec import NOT_IN_0_1, NOT_STORED, Stored
from metaopt_lens._errors import HeadError, ModelMismatchError
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.finetuning._added import change_hooks
from metaopt_lens.finetuning._settings import ATTENTION, MLP, PROJECTIONS, FinetuneSettings
from metaopt_lens.models import Hook, LensModel, ModelInfo, wrap

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class StepFactors:
    """What one step's gradient is made of: ``grad dW_K = sum_i x_i (x) e_i`` with ``e_i = dL/dk_i`` (before rotary
    and QK-norm), the explicit counterpart of keys and values in dW_ICL.

    Padded positions of a batch have e = 0.

    Attributes:
        x: attention inputs of every layer.
        e_q, e_k, e_v: error signals of the updated projections (None for the others).
        q: query vectors before rotary, under the weights of this step.
        n_tokens: length of each sequence in the batch.
    """

    x: Float[Tensor, "layer batch pos d_model"]
    e_q: Float[Tensor, "layer batch pos head d_head"] | None
    e_k: Float[Tensor, "layer batch pos kv_head d_head"] | None
    e_v: Float[Tensor, "layer batch pos kv_head d_head"] | None
    q: Float[Tensor, "layer batch pos head d_head"]
    n_tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class WeightUpdate(Stored):
    """The result of explicit finetuning: what was added to the projections of every layer.

    ``k_i <- k_i + x_i w_k + b_k`` before rotary and QK-norm, v and q likewise; ``attn_out <- attn_out + z w_o + b_o``.
    Updates are values: ``0.5 * update``, ``a + b``, ``update.select(heads)``. They never touch the model: use
    ``with update.applied(model):``.

    Attributes:
        model: sizes and parametrisation of the model it belongs to.
        w_k, w_v, w_q, w_o: changes of the weights; None for projections that were not updated.
        b_k, b_v, b_q, b_o: changes of the biases; None where not updated (or the base has none).
        w_mlp_in, w_mlp_gate, w_mlp_out: changes of the MLP's matrices, as they multiply a column (see `MlpSite`).
        losses: loss of every step, before the step.
        settings: how it was made; None for sums.
        factors: per-step factors, where asked for; not stored in files.
        trained_on: token ids of every sequence it was trained on, in the order given; None if that is not known (a sum
            of updates of different data, a file of 0.1).
        provenance: versions and time.
    """

    kind: ClassVar[str] = "weight update"

    model: ModelInfo
    w_k: Float[Tensor, "layer kv_head d_model d_head"] | None = None
    w_v: Float[Tensor, "layer kv_head d_model d_head"] | None = None
    w_q: Float[Tensor, "layer head d_model d_head"] | None = None
    w_o: Float[Tensor, "layer head d_head d_model"] | None = None
    b_k: Float[Tensor, "layer kv_head d_head"] | None = None
    b_v: Float[Tensor, "layer kv_head d_head"] | None = None
    b_q: Float[Tensor, "layer head d_head"] | None = None
    b_o: Float[Tensor, "layer d_model"] | None = None
    w_mlp_in: Float[Tensor, "layer d_mlp d_model"] | None = None
    w_mlp_gate: Float[Tensor, "layer d_mlp d_model"] | None = None
    w_mlp_out: Float[Tensor, "layer d_model d_mlp"] | None = None
    losses: tuple[float, ...] = ()
    settings: FinetuneSettings | None = None
    factors: tuple[StepFactors, ...] | None = field(default=None, metadata=NOT_STORED)
    trained_on: tuple[tuple[int, ...], ...] | None = field(default=None, metadata=NOT_IN_0_1)
    provenance: dict[str, Any] = field(default_factory=provenance)

    # ---- algebra ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All changes there are, by field name."""
        names = [*(f"w_{p}" for p in PROJECTIONS), *(f"b_{p}" for p in ATTENTION)]
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> WeightUpdate:
        changed = {name: function(tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, factors=None, **changed)  # type: ignore[arg-type]

    def __mul__(self, factor: float) -> WeightUpdate:
        return self._map(lambda tensor: tensor * factor)

    __rmul__ = __mul__

    def __neg__(self) -> WeightUpdate:
        return -1.0 * self

    def __add__(self, other: WeightUpdate) -> WeightUpdate:
        if self.model != other.model:
            raise ModelMismatchError(f"cannot add updates of {self.model.name} and {other.model.name}.")
        mine, theirs = self.tensors(), other.tensors()
        summed = {
            name: mine[name] + theirs[name] if name in mine and name in theirs else mine.get(name, theirs.get(name))
            for name in {**mine, **theirs}
        }
        same_data = self.trained_on if self.trained_on == other.trained_on else None
        return WeightUpdate(self.model, **summed, trained_on=same_data)  # type: ignore[arg-type]

    def __sub__(self, other: WeightUpdate) -> WeightUpdate:
        return self + -other

    def norm(self) -> float:
        """Frobenius norm over all layers and projections."""
        return float(sum(float(t.double().square().sum()) for t in self.tensors().values()) ** 0.5)

    def layer_norms(self) -> Float[Tensor, " layer"]:
        """Frobenius norm of each layer's update."""
        squares = [t.double().square().flatten(1).sum(1) for t in self.tensors().values()]
        return torch.stack(squares).sum(0).sqrt()

    def select(self, heads: Sequence[str | HeadRef | tuple[int, int]]) -> WeightUpdate:
        """The update of some heads only; 0 for the others.

        Args:
            heads: heads such as ``"L3H7"`` or ``(3, 7)``.

        Raises:
            HeadError: no heads, an unknown head, or only some of the heads that share a key-value head.
        """
        refs = [HeadRef.of(h) for h in heads]
        if not refs:
            raise HeadError("select needs at least one head.")
        info = self.model
        mask = torch.zeros(info.n_layers, info.n_heads, dtype=torch.bool)
        for ref in refs:
            ref.check(info.n_layers, info.n_heads)
            mask[ref.layer, ref.head] = True
        grouped = mask.view(info.n_layers, info.n_kv_heads, -1)
        if (self.w_k is not None or self.w_v is not None) and not bool((grouped.all(-1) == grouped.any(-1)).all()):
            raise HeadError(
                f"{info.name} shares each key-value head among {grouped.shape[-1]} heads: select all heads of a group "
                "or none."
            )
        kv_mask = grouped.any(-1)

        def keep(name: str, tensor: Tensor) -> Tensor:
            if name == "b_o" or name[2:] in MLP:
                return torch.zeros_like(tensor)  # belongs to no head
            chosen = (kv_mask if name[-1] in "kv" else mask).to(tensor.device)
            return tensor * chosen.view(*chosen.shape, *[1] * (tensor.ndim - 2))

        changed = {name: keep(name, tensor) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, factors=None, **changed)  # type: ignore[arg-type]

    # ---- application --------------------------------------------------------------------------------------------

    def hooks(self, model: Any) -> list[Hook]:
        """The hooks that make `model` the finetuned model.

        Args:
            model: the host or wrapped model that the hooks are for.

        Raises:
            ModelMismatchError: the update belongs to a model of another shape or parametrisation.
        """
        wrapped = wrap(model)
        wrapped.check_same(self.model, "this weight update")
        return [hook for layer in range(wrapped.info.n_layers) for hook in self.layer_hooks(wrapped, layer)]

    def layer_hooks(
        self,
        model: LensModel,
        layer: int,
        *,
        rows: slice = slice(None),
        projections: Sequence[str] = PROJECTIONS,
    ) -> list[Hook]:
        """Hooks of one layer; see `change_hooks`.

        Args:
            model: the wrapped model that the hooks are for.
            layer: counted from 0.
            rows: change these sequences of the batch only.
            projections: change these projections only.
        """
        chosen = {name: t[layer] for name, t in self.tensors().items() if name[2:] in projections}
        return change_hooks(model, layer, chosen, rows=rows)

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """Within the block, `model` is the finetuned model; afterwards it is exactly what it was.

        Args:
            model: `HookedTransformer`, `TransformerBridge` or a wrapped model.

        Raises:
            ModelMismatchError: the update belongs to a model of another shape or parametrisation.
        """
        wrapped = wrap(model)
        with wrapped.hooked(self.hooks(wrapped)):
            yield model

    # ---- reading ------------------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, projection and (key-value) head: Frobenius norms of dW and db; of the MLP, in no head."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for projection in ATTENTION:
            weight, bias = getattr(self, f"w_{projection}"), getattr(self, f"b_{projection}")
            if weight is None:
                continue
            for layer in range(weight.shape[0]):
                for head in range(weight.shape[1]):
                    per_head_bias = bias is not None and projection != "o"
                    rows.append(
                        {
                            "layer": layer,
                            "projection": projection,
                            "head": head,
                            "weight_norm": float(weight[layer, head].norm()),
                            "bias_norm": float(bias[layer, head].norm()) if per_head_bias else 0.0,
                        }
                    )
        for projection in MLP:
            weight = getattr(self, f"w_{projection}")
            for layer, change in enumerate(() if weight is None else weight):
                place = {"layer": layer, "projection": projection, "head": pd.NA}
                rows.append({**place, "weight_norm": float(change.norm()), "bias_norm": 0.0})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        projections = ", ".join(p for p in PROJECTIONS if getattr(self, f"w_{p}") is not None)
        made = ""
        if self.settings is not None:
            s = self.settings
            rule = "layer-causal " if s.layer_causal else ""
            made = f", {rule}{s.optimizer} lr {s.lr:g}, {len(self.losses)} steps"
            if self.losses:
                made += f", loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}"
        return f"WeightUpdate of {self.model.name} ({projections}; norm {self.norm():.4g}{made})"
