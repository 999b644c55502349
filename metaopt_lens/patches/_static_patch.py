"""One patch for all queries behind the same demonstrations: ridge regression on the exact patches of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import HeadError, OptionError, PromptError, UnsupportedModelError
from metaopt_lens._storage import provenance
from metaopt_lens.dual import ridge_right_factors, ridge_scale
from metaopt_lens.interventions import Change, DemoTokens, Staged
from metaopt_lens.models import ExpertsSite, Fingerprint, LensModel, ModelInfo, check_made_for, wrap
from metaopt_lens.patches._block_changes import OUT_MATRICES, StaticChanges
from metaopt_lens.patches._compile import Compiler
from metaopt_lens.patches._placing import PatchedRows
from metaopt_lens.patches._weight_patch import AGAIN, COMPILED_FOR, WeightPatch
from metaopt_lens.prompts import PromptLike, as_prompts
from metaopt_lens.runs import tokenize_all

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix

RIDGE = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class StaticPatch(Stored, Staged):
    """Changes of a model's matrices that do not depend on the token: the best for some queries (section 9).

    ``dW = argmin sum_k |t_k - dW x_k|^2 + lambda |dW|^2`` over all tokens of the fitting queries, with the inputs x_k
    and targets t_k of their exact patches. Held in factors: left factors are the targets. ``with intervene(model,
    patch):`` applies it to any zero-shot prompt, at in-context positions. Made by `static_patch`.

    Attributes:
        model: sizes and parametrisation of the model.
        tokens: S and the demonstrations.
        n_queries: how many queries it was fitted on.
        ridge: weight of the penalty, relative to the mean square of an input.
        precision: dtype that the factors are kept and applied in.
        left: left factors of every changed matrix; see `WeightPatch`.
        right: right factors, ``"in"`` of all input matrices and ``"out"`` of the output matrix.
        scale: change of the norm's scale, where the output goes through one.
        fingerprint: of every weight of the model.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "static weight patch"

    model: ModelInfo
    tokens: DemoTokens
    n_queries: int
    ridge: float
    precision: str
    left: Mapping[str, Float[Tensor, "layer fit _"]]
    right: Mapping[str, Float[Tensor, "layer fit _"]]
    scale: Float[Tensor, "layer d_model"] | None
    fingerprint: Fingerprint
    provenance: dict[str, Any] = field(default_factory=provenance)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the changed matrices."""
        return tuple(self.left)

    def dense(self, layer: int, matrix: str) -> FactoredMatrix:
        """The change of one matrix, ``[d_out, d_in]`` (column convention), factored.

        Args:
            layer: which block.
            matrix: one of `matrices`.

        Raises:
            HeadError, OptionError: no such layer or matrix.
        """
        from transformer_lens import FactoredMatrix

        if not 0 <= layer < self.model.n_layers:
            raise HeadError(f"there is no layer {layer}: the model has layers 0 to {self.model.n_layers - 1}.")
        if matrix not in self.left:
            has = ", ".join(map(repr, self.matrices))
            raise OptionError(f"the patch of {self.model.name} changes the matrices {has}, there is no {matrix!r}.")
        right = self.right["out" if matrix in OUT_MATRICES else "in"]
        return FactoredMatrix(self.left[matrix][layer].mT, right[layer])

    def change(self, model: LensModel) -> Change:
        """What it does to zero-shot prompts, whose tokens it puts at their in-context positions; see `intervene`.

        Args:
            model: the model it was fitted for, wrapped.

        Raises:
            ModelMismatchError: another model, other weights or another dtype.
            UnsupportedModelError: the model's tokens cannot be moved to their in-context positions.
        """
        check_made_for(model, self.model, self.fingerprint, what=COMPILED_FOR, again=AGAIN)
        placing = PatchedRows(model, self.tokens, None)

        def changes(layer: int, experts: ExpertsSite | None) -> StaticChanges:  # noqa: ARG001 - it has none
            return StaticChanges(
                placing,
                left={name: factor[layer] for name, factor in self.left.items()},
                right={name: factor[layer] for name, factor in self.right.items()},
                scale=None if self.scale is None else self.scale[layer],
            )

        return placing.change_blocks(changes, self.precision)

    def __repr__(self) -> str:
        return (
            f"StaticPatch of {self.model.name}: {len(self.tokens.spans)} demonstrations as changes of "
            f"{' and '.join(self.matrices)} in {self.model.n_layers} layers, fitted on {self.n_queries} queries with "
            f"ridge {self.ridge:g}"
        )


def static_patch(
    model: Any,
    prompts: Sequence[PromptLike],
    *,
    ridge: float = RIDGE,
    prepend_bos: bool | None = None,
    precision: str | None = None,
) -> StaticPatch:
    """One patch for all queries behind the same demonstrations, fitted on the exact patches of some.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: two or more queries behind the same demonstrations.
        ridge: weight of the penalty, relative to the mean square of an input; above 0.
        prepend_bos: put BOS first; None for the model's default.
        precision: see `compile_context`.

    Returns:
        The patch, to be applied with `intervene` to zero-shot prompts.

    Raises:
        PromptError: fewer than two queries, or different demonstrations.
        OptionError: a ridge that is not above 0.
        UnsupportedModelError: a mixture of experts, where every token changes experts of its own.
    """
    return fit_static(exact_patches(model, prompts, prepend_bos=prepend_bos, precision=precision), ridge=ridge)


def exact_patches(
    model: Any,
    prompts: Sequence[PromptLike],
    *,
    prepend_bos: bool | None = None,
    precision: str | None = None,
) -> list[WeightPatch]:
    """The exact patch of every query; the demonstrations are run once.

    Args:
        model: as for `static_patch`.
        prompts: queries behind the same demonstrations.
        prepend_bos: put BOS first; None for the model's default.
        precision: see `compile_context`.

    Returns:
        One patch for each prompt.

    Raises:
        PromptError: no prompts, or different demonstrations.
    """
    wrapped, queries = wrap(model), as_prompts(prompts)
    compiler = Compiler.of(wrapped, queries[0], prepend_bos=prepend_bos, precision=precision)
    tokens = tokenize_all(wrapped, queries, prepend_bos=prepend_bos, require_demos=True)
    shared = compiler.tokens.ids[: compiler.tokens.query.start]
    for number, found in enumerate(tokens):
        if found.ids[: found.query.start] != shared:
            raise PromptError(
                f"all queries must stand behind the same demonstrations: those of prompt {number} are not those of "
                "prompt 0. Fit one patch for each set of demonstrations."
            )
    return [compiler.compile(found) for found in tokens]


def fit_static(patches: Sequence[WeightPatch], *, ridge: float = RIDGE) -> StaticPatch:
    """The static patch of these queries; see `static_patch`.

    Args:
        patches: exact patches of two or more queries behind the same demonstrations.
        ridge: weight of the penalty, relative to the mean square of an input; above 0.

    Returns:
        The patch.

    Raises:
        PromptError: fewer than two patches.
        OptionError: a ridge that is not above 0.
        UnsupportedModelError: patches of a mixture of experts.
    """
    if len(patches) < 2:
        raise PromptError(f"a patch for all queries is fitted on two queries or more, got {len(patches)}.")
    if not ridge > 0:
        raise OptionError(f"ridge must be above 0, got {ridge}.")
    first = patches[0]
    if first.experts is not None:
        raise UnsupportedModelError(
            f"{first.model.name} is a mixture of experts: every token changes experts of its own, and the exact "
            "patches keep what one of them is applied to, not what all are: too little to fit one change for all "
            "tokens. Use the exact patch (compile_context)."
        )
    left = {name: torch.cat([patch.left[name] for patch in patches], dim=1) for name in first.left}
    right = {}
    for side in first.right:
        factors = torch.cat([patch.right[side] for patch in patches], dim=1)
        inputs = factors / factors.square().sum(-1, keepdim=True)  # x = r / |r|^2, as r = x / |x|^2
        right[side] = torch.stack([ridge_right_factors(x.double(), ridge).to(x) for x in inputs])
    scale = None
    if first.scale is not None:
        u = torch.cat([patch.u for patch in patches], dim=1)
        scales = torch.cat([patch.scale for patch in patches if patch.scale is not None], dim=1)
        normalized = torch.where(scales == 0, 0.0, u / scales)
        scale = torch.stack([ridge_scale(t, y, ridge) for t, y in zip(u, normalized, strict=True)])
    return StaticPatch(
        model=first.model,
        tokens=DemoTokens.of(first.tokens),
        n_queries=len(patches),
        ridge=ridge,
        precision=first.precision,
        left=left,
        right=right,
        scale=scale,
        fingerprint=first.fingerprint,
    )
