"""Where a block is patched: what is read there, and which of its matrices take the change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from metaopt_lens.models import ExpertsSite, Hook, LensModel, OutputNorm


@dataclass(frozen=True, eq=False)
class PatchSite:
    """The matrices of one block that take the context's place (docs/theory.md, section 9).

    Attributes:
        layer: which block.
        before: name of the hook point whose value in context, less its value without, is u.
        out_matrix: name of the matrix that adds u; "" where a norm's scale does.
        out_name: name of the hook point on what u is added to.
        hidden_name: name of the hook point on what the output matrix is applied to; None for experts.
        input_hook: hands the input of the input matrices to a function; None where they are not changed.
        products: names of the hook points on the products of the input matrices.
        weights: the changed matrices, column convention.
        norm: the norm that the output goes through.
        experts: of a mixture of experts.
    """

    layer: int
    before: str
    out_matrix: str
    out_name: str
    hidden_name: str | None = None
    input_hook: Callable[[Callable[[Tensor], Any]], Hook] | None = None
    products: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    norm: OutputNorm | None = None
    experts: ExpertsSite | None = None


def patch_site(model: LensModel, layer: int) -> PatchSite:
    """Where a block of this model is patched.

    Args:
        model: a wrapped model.
        layer: which block.

    Raises:
        UnsupportedModelError: its MLP is of an unknown kind, or its attention's output cannot be read.
    """
    mlp = model.block_mlp(layer)
    if mlp is None:  # attention-only: W_O, which maps the heads side by side
        name, w_o = model.hook_name("attn_out", layer), model.w_o(layer)
        # head d_head d_model -> d_model (head d_head)
        weights = {"o": w_o.reshape(-1, w_o.shape[-1]).mT}
        return PatchSite(layer, name, "o", name, hidden_name=model.hook_name("z", layer), weights=weights)
    if isinstance(mlp, ExpertsSite):
        return PatchSite(
            layer,
            model.residual_hook("mid", layer),
            out_matrix="expert_out",
            out_name=mlp.out_name,
            weights={"router": mlp.w_router},
            experts=mlp,
        )
    weights = {**({} if mlp.parallel else mlp.matrices), **({} if mlp.norm else {"out": mlp.w_out})}
    return PatchSite(
        layer,
        model.hook_name("attn_out", layer) if mlp.parallel else model.residual_hook("mid", layer),
        out_matrix="" if mlp.norm else "out",
        out_name=mlp.norm.out_name if mlp.norm else mlp.out_name,
        hidden_name=mlp.hidden_name,
        input_hook=None if mlp.parallel else mlp.input_hook,
        products={} if mlp.parallel else mlp.products,
        weights=weights,
        norm=mlp.norm,
    )
