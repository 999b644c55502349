"""Changes of a model's own matrices, one set for every token of a query, that do what the demonstrations do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import HeadError, OptionError
from metaopt_lens._storage import provenance
from metaopt_lens.interventions import Change, DemoTokens, Staged
from metaopt_lens.models import ExpertsSite, Fingerprint, LensModel, ModelInfo, check_made_for
from metaopt_lens.patches._block_changes import OUT_MATRICES, TokenChanges
from metaopt_lens.patches._placing import PatchedRows
from metaopt_lens.prompts import TokenizedPrompt

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens import FactoredMatrix

COMPILED_FOR, AGAIN = "this patch was compiled for", "compile_context(model, prompt)"


@dataclass(frozen=True, eq=False)
class ExpertChanges:
    """What the changes of a mixture of experts need beyond those of the router.

    Attributes:
        active: the experts that each token uses in context.
        left_in: ``W (z_C - z)`` of each of them, gate and input matrix as the model keeps their rows.
        chosen: the one whose output matrix adds u.
        shift: ``z_C - z``.
    """

    active: Int[Tensor, "layer pos active"]
    left_in: Float[Tensor, "layer pos active d_product"]
    chosen: Int[Tensor, "layer pos"]
    shift: Float[Tensor, "layer pos d_model"]


@dataclass(frozen=True, eq=False, repr=False)
class WeightPatch(Stored, Staged):
    """The context as weights (arXiv:2511.17864; docs/theory.md, section 9).

    For every layer and every token behind S: rank-one changes ``left (x) right`` of the MLP's matrices (of ``W_O`` in
    attention-only models; of the scale of a norm that the MLP's output goes through), with which the model gives on
    the zero-shot prompt, at in-context positions, what it gives in context. ``with intervene(model, patch):`` applies
    it. Made by `compile_context`.

    Attributes:
        model: sizes and parametrisation of the model it belongs to.
        tokens: the in-context prompt.
        continuation: ids of tokens behind the query that it was extended to.
        next_token: id of the token that the patched model is most sure comes next.
        precision: dtype that the factors are kept and applied in.
        left: left factors of every changed matrix: ``"gate"``, ``"in"``, ``"out"``; ``"o"``; ``"router"`` and
            ``"expert_out"``.
        right: right factors, ``"in"`` of all input matrices and ``"out"`` of the output matrix.
        u: what the demonstrations add to the residual stream, through attention.
        scale: change of the norm's scale, where the output goes through one.
        smallest: smallest coordinate of the normalised output, which u is divided by; where there is a scale.
        experts: of a mixture of experts.
        weight_norms: Frobenius norms of the matrices that are changed.
        fingerprint: of every weight of the model.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "weight patch"

    model: ModelInfo
    tokens: TokenizedPrompt
    continuation: tuple[int, ...]
    next_token: int
    precision: str
    left: Mapping[str, Float[Tensor, "layer pos _"]]
    right: Mapping[str, Float[Tensor, "layer pos _"]]
    u: Float[Tensor, "layer pos d_model"]
    scale: Float[Tensor, "layer pos d_model"] | None
    smallest: Float[Tensor, "layer pos"] | None
    experts: ExpertChanges | None
    weight_norms: Mapping[str, Float[Tensor, " layer"]]
    fingerprint: Fingerprint
    provenance: dict[str, Any] = field(default_factory=provenance)

    # ---- what it is made of -------------------------------------------------------------------------------------

    @property
    def query_ids(self) -> tuple[int, ...]:
        """Ids of the tokens it has changes for: the query and its continuation."""
        return (*self.tokens.ids[self.tokens.query.start :], *self.continuation)

    @property
    def generated(self) -> tuple[int, ...]:
        """Ids of the greedy text behind the query, as far as it goes: the continuation and the next token."""
        return (*self.continuation, self.next_token)

    @property
    def positions(self) -> range:
        """Where these tokens stand in context."""
        return range(self.tokens.query.start, self.tokens.query.start + len(self.query_ids))

    @property
    def zero_shot_ids(self) -> tuple[int, ...]:
        """The prompt it is applied to: S, the query, and its continuation."""
        return (*self.tokens.ids[: self.tokens.prefix.stop], *self.query_ids)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the changed matrices."""
        return tuple(self.left)

    def dense(self, layer: int, position: int = -1, matrix: str | None = None) -> FactoredMatrix:
        """The change of one matrix for one token, ``[d_out, d_in]`` (column convention), factored.

        Args:
            layer: which block.
            position: which token behind S, from 0; -1 for the last.
            matrix: one of `matrices`; None for the output matrix, or the only one there is.

        Raises:
            HeadError, OptionError: no such layer, token or matrix.
        """
        from transformer_lens import FactoredMatrix

        name = self._matrix(matrix)
        at = self._row(layer, position)
        right = self.right["out" if name in OUT_MATRICES else "in"]
        return FactoredMatrix(self.left[name][layer, at][:, None], right[layer, at][None])

    def norms(self, matrix: str | None = None) -> Float[Tensor, "layer pos"]:
        """Frobenius norms of a matrix's changes.

        Args:
            matrix: one of `matrices`; None for the output matrix, or the only one there is.
        """
        name = self._matrix(matrix)
        right = self.right["out" if name in OUT_MATRICES else "in"]
        found: Tensor = self.left[name].norm(dim=-1) * right.norm(dim=-1)
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row for every layer, token and matrix: norm of the change, relative to the matrix, and its share.

        ``share`` is that of the squared norm of all matrices' changes at this layer and token; ``"scale"`` stands for
        the change of a norm's scale, which is no matrix and has none; ``"experts_in"`` for all active experts' input
        matrices together. What is not relative to one matrix is NaN.
        """
        import pandas as pd

        norms = {name: self.norms(name) for name in self.matrices}
        if self.experts is not None:  # of all active experts together
            norms["experts_in"] = self.experts.left_in.flatten(2).norm(dim=-1) * self.right["in"].norm(dim=-1)
        whole = torch.stack([norm.square() for norm in norms.values()]).sum(0)
        rows = []
        for layer in range(self.model.n_layers):
            for row, (position, token) in enumerate(zip(self.positions, self.query_ids, strict=True)):
                at = {"layer": layer, "position": position, "token": token}
                for name, norm in norms.items():
                    n = float(norm[layer, row])
                    of = float(self.weight_norms[name][layer]) if name in self.weight_norms else math.nan
                    share = n**2 / float(whole[layer, row])
                    rows.append({**at, "matrix": name, "norm": n, "relative": n / of, "share": share})
                if self.scale is not None:
                    rows.append({**at, "matrix": "scale", "norm": float(self.scale[layer, row].norm())})
        return pd.DataFrame(rows)

    def _matrix(self, matrix: str | None) -> str:
        outs = [name for name in self.matrices if name in OUT_MATRICES]
        name = (outs or [*self.matrices])[0] if matrix is None else matrix
        if name not in self.left:
            has = ", ".join(map(repr, self.matrices))
            raise OptionError(f"the patch of {self.model.name} changes the matrices {has}, there is no {matrix!r}.")
        return name

    def _row(self, layer: int, position: int) -> int:
        n = len(self.query_ids)
        if not 0 <= layer < self.model.n_layers:
            raise HeadError(f"there is no layer {layer}: the model has layers 0 to {self.model.n_layers - 1}.")
        if not -n <= position < n:
            raise OptionError(f"there is no token {position}: the patch has changes for {n} tokens, counted from 0.")
        return position % n

    # ---- application --------------------------------------------------------------------------------------------

    def change(self, model: LensModel) -> Change:
        """What it does to the zero-shot prompt, whose tokens it puts at their in-context positions; see `intervene`.

        Args:
            model: the model it was compiled for, wrapped.

        Raises:
            ModelMismatchError: another model, other weights or another dtype.
            UnsupportedModelError: the model's tokens cannot be moved to their in-context positions.
        """
        self.check_model(model)
        placing = PatchedRows(model, DemoTokens.of(self.tokens), self.query_ids)
        return placing.change_blocks(partial(self.changes, placing=placing), self.precision)

    def changes(self, layer: int, experts: ExpertsSite | None, placing: PatchedRows) -> TokenChanges:
        """The changes of one block, in a pass that `placing` watches.

        Args:
            layer: which block.
            experts: of a mixture of experts.
            placing: says which row belongs to which token.
        """
        own = self.experts
        others = {"scale": self.scale} | ({} if own is None else {"shift": own.shift, "chosen": own.chosen})
        return TokenChanges(
            placing,
            left={name: factor[layer] for name, factor in self.left.items()},
            right={name: factor[layer] for name, factor in self.right.items()},
            other={name: factor[layer] for name, factor in others.items() if factor is not None},
            experts=experts,
        )

    def check_model(self, model: LensModel) -> None:
        """Raise `ModelMismatchError` unless it was compiled for this model, with these weights, in this dtype.

        Args:
            model: a wrapped model.
        """
        check_made_for(model, self.model, self.fingerprint, what=COMPILED_FOR, again=AGAIN)

    def __repr__(self) -> str:
        changed = " and ".join([*self.matrices, *(["the norm's scale"] if self.scale is not None else [])])
        return (
            f"WeightPatch of {self.model.name}: {len(self.tokens.demos)} demonstrations as rank-one changes of "
            f"{changed} in {self.model.n_layers} layers, for {len(self.query_ids)} tokens, in {self.precision}"
        )
