"""Sister lens: the weight update of the MLP that a context is equal to, at one token (arXiv:2507.16003)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import HeadError, OptionError, UnsupportedModelError
from metaopt_lens.dual import implicit_weight_update
from metaopt_lens.models import Hook, LensModel, MlpSite, ModelInfo, wrap
from metaopt_lens.prompts import PromptLike, TokenizedPrompt, as_prompt
from metaopt_lens.runs import tokenize_for

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens import FactoredMatrix

# Rounding of the model's own arithmetic, relative, with room to spare.
_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitUpdate:
    """Per block, dW and db that make the MLP without context compute what it computes in context, at the last token.

    ``dW = left (x) right`` on every input matrix (column convention), of rank one, and db on the output bias: the block
    on the zero-shot prompt then outputs, at this token, what it outputs on the in-context prompt (docs/theory.md,
    section 5). Each layer's update is for that block alone, the blocks below it as they are without context.

    Attributes:
        left_in, left_gate: ``W (u_C - u)`` of the input matrix and of the gate (None for a plain MLP).
        right: ``u / |u|^2`` with the MLP's normed input u without context.
        db: change of the residual stream before the MLP.
        weight_norm_in, weight_norm_gate: Frobenius norms of the matrices that are updated.
        output: what each block outputs in context, the target.
    """

    model: ModelInfo
    tokenized: TokenizedPrompt
    left_in: Float[Tensor, "layer d_mlp"]
    left_gate: Float[Tensor, "layer d_mlp"] | None
    right: Float[Tensor, "layer d_model"]
    db: Float[Tensor, "layer d_model"]
    weight_norm_in: Float[Tensor, " layer"]
    weight_norm_gate: Float[Tensor, " layer"] | None
    output: Float[Tensor, "layer d_model"]

    def delta(self, layer: int, matrix: str = "in") -> FactoredMatrix:
        """dW of matrix ``"in"`` or ``"gate"``, ``[d_mlp, d_model]``, factored."""
        from transformer_lens import FactoredMatrix

        left = self._left(matrix)
        self._check_layer(layer)
        return FactoredMatrix(left[layer][:, None], self.right[layer][None])

    def at(self, layer: int) -> AppliedImplicitUpdate:
        """The intervention that puts one block's update on its MLP, at all tokens as a weight update does."""
        self._check_layer(layer)
        return AppliedImplicitUpdate(self, layer)

    def norms(self, matrix: str = "in") -> Float[Tensor, " layer"]:
        """Frobenius norm of dW in every layer."""
        norms: Tensor = self._left(matrix).norm(dim=-1) * self.right.norm(dim=-1)
        return norms

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: norms of dW (also relative to W) and db."""
        import pandas as pd

        columns = {"layer": range(self.model.n_layers)}
        frame = pd.DataFrame(columns)
        for matrix, whole in (("in", self.weight_norm_in), ("gate", self.weight_norm_gate)):
            if whole is not None:
                frame[f"dw_{matrix}_norm"] = self.norms(matrix).cpu().numpy()
                frame[f"dw_{matrix}_relative"] = (self.norms(matrix) / whole).cpu().numpy()
        frame["db_norm"] = self.db.norm(dim=-1).cpu().numpy()
        return frame

    def _left(self, matrix: str) -> Tensor:
        if matrix not in {"in", "gate"}:
            raise OptionError(f"matrix must be 'in' or 'gate', got {matrix!r}.")
        left = self.left_in if matrix == "in" else self.left_gate
        if left is None:
            raise OptionError(f"the MLPs of {self.model.name} have matrix 'in' only, got {matrix!r}.")
        return left

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.model.n_layers:
            raise HeadError(f"there is no layer {layer}: the model has layers 0 to {self.model.n_layers - 1}.")

    def __repr__(self) -> str:
        gate = "" if self.left_gate is None else " and gate"
        sizes = ", ".join(f"{float(n):.3g}" for n in self.norms())
        return f"ImplicitUpdate of {self.model.name}: rank-one dW of the input{gate} matrices, norms by layer {sizes}"


@dataclass(frozen=True, eq=False)
class AppliedImplicitUpdate:
    """One block's implicit update as an intervention."""

    update: ImplicitUpdate
    layer: int

    def hooks(self, model: LensModel) -> list[Hook]:
        """Hooks that add ``dW u`` before the activation and db to the MLP's output."""
        model.check_same(self.update.model, "this implicit update")
        site, seen = _sequential_mlp(model, self.layer), {}

        def keep(u: Tensor) -> None:
            seen["u"] = u

        def add(left: Tensor) -> Any:
            def change(product: Tensor) -> Tensor:
                along = seen["u"].to(left.dtype) @ self.update.right[self.layer].to(seen["u"].device)
                return product + (along[..., None] * left.to(along.device)).to(product.dtype)

            return change

        def shift(out: Tensor) -> Tensor:
            return out + self.update.db[self.layer].to(out)

        hooks = [site.input_hook(keep)]
        hooks += [(product, add(self.update._left(name)[self.layer])) for name, product in site.products.items()]
        return [*hooks, (site.out_name, shift)]


@dataclass(frozen=True)
class _BlockPass:
    """What one run shows of a block at the last token."""

    u: Tensor
    products: dict[str, Tensor]
    out: Tensor
    before: Tensor
    after: Tensor


def implicit_update(model: Any, prompt: PromptLike, *, prepend_bos: bool | None = None) -> ImplicitUpdate:
    """The rank-one MLP updates that the demonstrations are equal to, at the query's last token, block by block.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model with pre-norm blocks and plain or gated MLPs.
        prompt: one, in the forms `decompose` takes.
        prepend_bos: put BOS first; None for the model's default.

    Raises:
        UnsupportedModelError: parallel, attention-only, mixture-of-experts or post-norm blocks; names which.
        PromptError, ContextWindowError: the prompt cannot be run.
    """
    wrapped = wrap(model)
    sites = [_sequential_mlp(wrapped, layer) for layer in range(wrapped.info.n_layers)]
    tokens = tokenize_for(wrapped, as_prompt(prompt), prepend_bos=prepend_bos, require_demos=True)
    in_context = _run(wrapped, sites, tokens.ids)
    zero_shot = _run(wrapped, sites, tokens.zero_shot().ids)
    lefts: dict[str, list[Tensor]] = {name: [] for name in sites[0].matrices}
    rights = []
    for layer, (site, without, within) in enumerate(zip(sites, zero_shot, in_context, strict=True)):
        for name, weight in site.matrices.items():
            left, right = implicit_weight_update(weight.detach(), without.u, within.u)
            _require(wrapped, layer, within.products[name] - without.products[name], left, f"its {name!r} matrix")
            lefts[name].append(left)
        for seen in (without, within):
            _require(wrapped, layer, seen.after - seen.before, seen.out, "its MLP's output")
        rights.append(right)
    norms = {name: torch.stack([_norm(site.matrices[name]) for site in sites]) for name in lefts}
    device = rights[0].device

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([t.to(device) for t in tensors])

    return ImplicitUpdate(
        model=wrapped.info,
        tokenized=tokens,
        left_in=stack(lefts["in"]),
        left_gate=stack(lefts["gate"]) if "gate" in lefts else None,
        right=stack(rights),
        db=stack([within.before - without.before for without, within in zip(zero_shot, in_context, strict=True)]),
        weight_norm_in=norms["in"],
        weight_norm_gate=norms.get("gate"),
        output=stack([within.after for within in in_context]),
    )


def _sequential_mlp(model: LensModel, layer: int) -> MlpSite:
    """The MLP of a block in which it simply follows attention."""
    reason = model.why_no_mlp(layer)
    if reason is None:
        site = model.mlp_site(layer)
        if not site.parallel and not site.is_normed:
            return site
        reason = "attention and MLP run in parallel" if site.parallel else "the MLP's output is normalised"
    raise UnsupportedModelError(
        f"the implicit weight update of {model.info.name} is not defined: {reason}. It needs pre-norm blocks whose "
        "plain or gated MLP follows attention."
    )


def _run(model: LensModel, sites: Sequence[MlpSite], ids: Sequence[int]) -> list[_BlockPass]:
    seen: list[dict[str, Tensor]] = [{} for _ in sites]

    def keep(layer: int, key: str) -> Any:
        def store(tensor: Tensor) -> None:
            seen[layer][key] = tensor.detach().reshape(-1, tensor.shape[-1])[-1]  # one sequence: its last token

        return store

    hooks: list[Hook] = []
    for layer, site in enumerate(sites):
        hooks.append(site.input_hook(keep(layer, "u")))
        hooks += [(name, keep(layer, matrix)) for matrix, name in site.products.items()]
        hooks.append((site.out_name, keep(layer, "out")))
        hooks += [(model.residual_hook(end, layer), keep(layer, end)) for end in ("mid", "post")]
    model.run(torch.tensor([list(ids)]), hooks=hooks)
    return [
        _BlockPass(
            u=at["u"],
            products={name: at[name] for name in site.products},
            out=at["out"],
            before=at["mid"],
            after=at["post"],
        )
        for at, site in zip(seen, sites, strict=True)
    ]


def _norm(weight: Tensor) -> Tensor:
    norm: Tensor = weight.detach().float().norm()
    return norm


def _require(model: LensModel, layer: int, actual: Tensor, predicted: Tensor, what: str) -> None:
    error = (actual.to(predicted) - predicted).abs().max() / actual.abs().max().clamp_min(1e-6)
    if error > _TOLERANCE[model.info.dtype] * 10:
        raise UnsupportedModelError(
            f"the implicit weight update of {model.info.name} ({model.info.architecture}) is not exact: {what} in "
            f"layer {layer} is not what its pre-norm block would give (off by {float(error):.1e})."
        )
