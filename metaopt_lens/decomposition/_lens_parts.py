"""Which vector of the residual stream a lens reads: parts of heads, layers and demonstrations, and weight updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens._types import HeadRef, TokenSpan
from metaopt_lens.decomposition._direct_logits import kept_stream
from metaopt_lens.models import LensModel
from metaopt_lens.runs import Run, linear_parts, part_of, run_linear_weights, softmax_parts, softmax_weights

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix

PARTS = ("meta_gradient", "zero_shot", "z", "linear_meta_gradient", "linear_zero_shot")


def check_part(part: str, demo: int | None, n_demos: int) -> None:
    """Raise `OptionError` for a part or a demonstration that does not exist.

    Args:
        part: its name. demo: which demonstration's share. n_demos: how many there are.
    """
    if part not in (*PARTS, "mlp"):
        raise OptionError(f"part must be {', '.join(map(repr, PARTS))} or, for a layer, 'mlp', got {part!r}.")
    if demo is None:
        return
    if not part.endswith("meta_gradient"):
        raise OptionError(
            f"a demonstration has a share of 'meta_gradient' and 'linear_meta_gradient', not of {part!r}."
        )
    if not 0 <= demo < n_demos:
        raise OptionError(f"there is no demonstration {demo}: the prompt has {n_demos}, counted from 0.")


def part_in_z(run: Run, part: str, demo: TokenSpan | None) -> Float[Tensor, "dst layer head d_head"]:
    """A part of every head's z.

    Args:
        run: an in-context run. part: see `PARTS`. demo: one demonstration's share of a meta-gradient; None for all.
    """
    if part == "z":
        return run.z
    linear = part.startswith("linear_")
    if demo is not None:
        return part_of(run, run_linear_weights if linear else softmax_weights, demo)
    parts = linear_parts(run) if linear else softmax_parts(run)
    found: Tensor = getattr(parts, part.removeprefix("linear_"))
    return found


def written(
    model: LensModel, run: Run, layer: int, heads: list[int], z: Float[Tensor, "head d_head"]
) -> Float[Tensor, " d_model"]:
    """What heads of one layer write into the residual stream: through W_O and a norm after attention, its scale held.

    Args:
        model: a wrapped model. run: at one destination. layer: counted from 0. heads: which. z: a part of theirs.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    w_o = model.w_o(layer).detach().to(dtype=dtype)
    out = torch.einsum("hd,hdm->m", z.to(dtype), w_o[heads])
    norm = model.norm_after_attention(layer)
    if norm is None:
        return out
    whole = torch.einsum("hd,hdm->m", run.z[0, layer].to(dtype), w_o)
    bias = model.b_o(layer)
    whole = whole if bias is None else whole + bias.detach().to(whole)
    out = out - out.mean() if norm.kind == "LN" else out
    out = out if norm.gain is None else out * norm.gain.detach().to(out)
    return out / norm.scale(whole)


def final_scale(model: LensModel, run: Run) -> Float[Tensor, ""]:
    """The final norm's scale at a run's only destination; 1 without a norm.

    Args:
        model: a wrapped model. run: recorded with ``Keep(stream=True)``.
    """
    end = kept_stream(run).end[0]
    end = end.detach().to(torch.promote_types(end.dtype, torch.float32))
    norm = model.head.fixed_norm
    return torch.ones_like(end[0]) if norm is None else norm.scale(end)


def singular_directions(
    update: FactoredMatrix, k: int
) -> tuple[Float[Tensor, "d_head rank"], Float[Tensor, " rank"], Float[Tensor, "d_head rank"]]:
    """Leading left and right singular vectors of a head's update, the larger entries of the left ones positive.

    Args:
        update: ``dW`` of one head, ``[d_head, d_head]``, factored. k: how many.
    """
    dw = update.A.detach() @ update.B.detach()
    u, s, vh = torch.linalg.svd(dw.to(torch.promote_types(dw.dtype, torch.float32)))
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()[0]
    signs = torch.where(signs == 0, 1.0, signs)
    return (u * signs)[:, :k], s[:k], (vh.mT * signs)[:, :k]


def head_or_layer(
    head: str | HeadRef | tuple[int, int] | None, layer: int | None, model: LensModel
) -> tuple[int, list[int]]:
    """A layer, and which of its heads: one, or all.

    Args:
        head: one head. layer: all heads of a layer. model: a wrapped model.

    Raises:
        OptionError: both or neither. HeadError: a head or layer that the model does not have.
    """
    if (head is None) == (layer is None):
        raise OptionError("name a head, as in lens('L3H7'), or a layer, as in lens(layer=3).")
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    if head is not None:
        ref = HeadRef.of(head).check(n_layers, n_heads)
        return ref.layer, [ref.head]
    assert layer is not None
    HeadRef(layer, 0).check(n_layers, n_heads)
    return layer, list(range(n_heads))
