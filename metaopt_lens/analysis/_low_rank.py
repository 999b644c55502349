"""dW_ICL and dW_FT of every head compared: by their action on the query, and as matrices (theory, section 4)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt_lens.analysis._matrices import Factors, Spectrum, overlap, spectrum
from metaopt_lens.analysis._similarity import difference
from metaopt_lens.dual import at_least_float32
from metaopt_lens.finetuning import UpdatedMemory
from metaopt_lens.runs import Run, delta_w_icl

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


@dataclass(frozen=True, eq=False)
class MemoryBatch:
    """dW_FT of some queries of one demonstration set, and what is kept of its singular value decomposition.

    Attributes:
        k, v: of each query's Z in the base model, 0 for sources that its last token does not see or that it has not.
        dk, dv: what the update adds.
        subspace_dim: dimension of the singular subspaces.
        changed: whether the update changed a head's keys or values by more than rounding; otherwise dW_FT is rounding.
    """

    k: Float[Tensor, "query layer src kv_head d_head"]
    v: Float[Tensor, "query layer src kv_head d_head"]
    dk: Float[Tensor, "query layer src kv_head d_head"]
    dv: Float[Tensor, "query layer src kv_head d_head"]
    subspace_dim: int
    changed: Bool[Tensor, "query layer kv_head"]

    @classmethod
    def of(cls, memories: Sequence[UpdatedMemory], icl: Sequence[Run], *, subspace_dim: int) -> MemoryBatch:
        """The memories of some queries.

        Args:
            memories: of the queries.
            icl: their in-context runs, which say what the last token sees.
            subspace_dim: dimension of the singular subspaces.
        """
        seen = [run.visible[:, -1][:, ~run.in_demos].T for run in icl]  # each [src layer]

        def stacked(name: str) -> Tensor:
            rows = [
                getattr(m, name).transpose(0, 1) * own[..., None, None] for m, own in zip(memories, seen, strict=True)
            ]
            return pad_sequence(rows, batch_first=True).transpose(1, 2)  # [query src layer ..] -> [query layer src ..]

        k, v, new_k, new_v = (stacked(name) for name in ("k", "v", "k_updated", "v_updated"))
        changed = _changed(new_k, k) | _changed(new_v, v)
        return cls(k, v, new_k - k, new_v - v, subspace_dim, changed.cpu())

    def factors(self, layer: int) -> Factors:
        """dW_FT of every query and key-value head, written ``sum_Z dv (x) (k + dk) + v (x) dk`` (see `delta_w_ft`).

        Args:
            layer: counted from 0.
        """
        k, v, dk, dv = (t[:, layer].transpose(1, 2) for t in (self.k, self.v, self.dk, self.dv))  # query kv src d_head
        return Factors(left=torch.cat([dv, v], dim=2).mT, right=torch.cat([k + dk, dk], dim=2))

    @cached_property
    def leading(self) -> list[Spectrum]:
        """Of every layer: all singular values, but the leading vectors only."""
        return [spectrum(self.factors(layer)).leading(self.subspace_dim) for layer in range(self.k.shape[1])]

    def rotated(self, *, seed: int) -> MemoryBatch:
        """The same with what finetuning changed turned at random, one rotation for each layer and head.

        dW_FT also holds the model's own keys and values, which resemble those of the demonstrations whatever was
        learned: a random subspace would be too easy a null. A Gaussian update is as likely as any rotation of it. All
        queries are turned alike, as one update changed them all.

        Args:
            seed: of the rotations.
        """
        generator = torch.Generator().manual_seed(seed)
        _, n_layers, _, n_heads, d_head = self.k.shape

        def turned(change: Tensor) -> Tensor:
            draw = torch.randn(n_layers, n_heads, d_head, d_head, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(draw)
            rotation = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # uniform: the signs of R are fixed
            return torch.einsum("qlshd,lhde->qlshe", change, rotation.to(change))

        return dataclasses.replace(self, dk=turned(self.dk), dv=turned(self.dv))


@dataclass(frozen=True, eq=False)
class MatrixReadings:
    """dW_ICL against dW_FT. NaN where finetuning changed neither keys nor values of a head by more than rounding.

    Attributes:
        linear_ft: ``dW_FT q`` with q of the in-context run.
        frobenius: cosine of the matrices dW_ICL and dW_FT.
        left, right: mean squared cosine of the principal angles of their leading singular subspaces, on the output and
            on the input side (NaN where a rank is too small).
        rank_icl, rank_ft: effective ranks.
    """

    linear_ft: Float[Tensor, "query layer head d_head"]
    frobenius: Float[Tensor, "query layer head"]
    left: Float[Tensor, "query layer head"]
    right: Float[Tensor, "query layer head"]
    rank_icl: Float[Tensor, "query layer head"]
    rank_ft: Float[Tensor, "query layer head"]


def compare_matrices(icl: Sequence[Run], memory: MemoryBatch) -> MatrixReadings:
    """Compare both matrices of every query, layer and head.

    Args:
        icl: in-context runs of queries behind the same demonstrations.
        memory: of the same queries.
    """
    group = icl[0].model.n_heads // icl[0].model.n_kv_heads
    layers = []
    for layer, (first, second) in enumerate(zip(icl_spectra(icl), memory.leading, strict=True)):
        matrices = memory.factors(layer)
        left, right = overlap(first, second, k=memory.subspace_dim)
        of_heads = {
            "frobenius": first.cosine_with(matrices, norm=second.norm),
            "left": left,
            "right": right,
            "rank_ft": second.effective_rank,
            "rank_icl": first.effective_rank.expand(len(icl), -1),
        }
        row = {name: _kept(t).repeat_interleave(group, dim=1) for name, t in of_heads.items()}
        row["linear_ft"] = _kept(_applied(matrices, torch.stack([run.q[-1, layer] for run in icl])))
        layers.append(row)
    found = {name: torch.stack([row[name] for row in layers], dim=1) for name in layers[0]}
    changed = memory.changed.repeat_interleave(group, dim=-1)
    for name in found.keys() - {"rank_icl"}:
        found[name] = torch.where(changed[..., None] if found[name].ndim > 3 else changed, found[name], torch.nan)
    return MatrixReadings(**found)


def read_with_keys(icl: Sequence[Run], memory: MemoryBatch) -> tuple[Tensor, Tensor]:
    """dW_ICL and dW_FT applied to the last token's own key instead of its query (after arXiv:2602.21204).

    Args:
        icl: in-context runs of queries behind the same demonstrations.
        memory: of the same queries.

    Returns:
        Two tensors ``[query, layer, head, d_head]``, the second NaN where finetuning changed no more than rounding.
    """
    group = icl[0].model.n_heads // icl[0].model.n_kv_heads
    first, second = [], []
    for layer, in_context in enumerate(icl_factors(icl)):
        keys = torch.stack([run.own_k[layer, -1].repeat_interleave(group, dim=0) for run in icl])
        first.append(_kept(_applied(in_context, keys)))
        second.append(_kept(_applied(memory.factors(layer), keys)))
    changed = memory.changed.repeat_interleave(group, dim=-1)[..., None]
    return torch.stack(first, dim=1), torch.where(changed, torch.stack(second, dim=1), torch.nan)


def rotated_overlaps(icl: Sequence[Run], memory: MemoryBatch) -> tuple[Tensor, Tensor]:
    """`left` and `right` of `MatrixReadings` after a random rotation of what finetuning changed.

    Args:
        icl: in-context runs of queries behind the same demonstrations, which decide the rotation.
        memory: of the same queries.

    Returns:
        Two tensors ``[query, layer, head]``.
    """
    group = icl[0].model.n_heads // icl[0].model.n_kv_heads
    tokens = icl[0].tokens
    turned = memory.rotated(seed=zlib.crc32(str(tokens.ids[: tokens.query.start]).encode()))
    pairs = zip(icl_spectra(icl), turned.leading, strict=True)
    sides = zip(*(overlap(first, second, k=memory.subspace_dim) for first, second in pairs), strict=True)
    changed = memory.changed.repeat_interleave(group, dim=-1)
    stacked = [_kept(torch.stack(side, dim=1)).repeat_interleave(group, dim=-1) for side in sides]
    left, right = (torch.where(changed, side, torch.nan) for side in stacked)
    return left, right


def icl_spectra(icl: Sequence[Run]) -> Iterator[Spectrum]:
    """Singular value decomposition of dW_ICL of every layer; see `icl_factors`.

    Args:
        icl: in-context runs of queries behind the same demonstrations.
    """
    return map(spectrum, icl_factors(icl))


def icl_factors(icl: Sequence[Run]) -> Iterator[Factors]:
    """dW_ICL of every layer; one matrix for all queries where they see the same demonstration tokens.

    Args:
        icl: in-context runs of queries behind the same demonstrations.
    """
    demos = icl[0].tokens.demonstrations.slice
    visible = [run.visible[:, -1, demos] for run in icl]  # each [layer, src]
    for layer in range(len(icl[0].own_k)):
        same = all(torch.equal(row[layer], visible[0][layer]) for row in visible)
        yield stack_factors([delta_w_icl(run, layer) for run in (icl[:1] if same else icl)])


def stack_factors(matrices: Sequence[FactoredMatrix]) -> Factors:
    """Matrices of several queries together; sources of the shorter ones are filled with zeros, which add nothing.

    Args:
        matrices: each of all key-value heads.
    """
    longest = max(m.A.shape[-1] for m in matrices)
    pad = torch.nn.functional.pad
    return Factors(
        left=torch.stack([pad(m.A, (0, longest - m.A.shape[-1])) for m in matrices]),
        right=torch.stack([pad(m.B, (0, 0, 0, longest - m.B.shape[-2])) for m in matrices]),
    )


def _changed(
    new: Float[Tensor, "query layer src kv_head d_head"], old: Float[Tensor, "query layer src kv_head d_head"]
) -> Bool[Tensor, "query layer kv_head"]:
    """Whether an update changed a head's keys (or values) by more than rounding."""
    flat = [t.transpose(2, 3).flatten(3) for t in (new, old)]  # [query layer kv_head src * d_head]
    return ~difference(*flat).isnan().any(-1)


def _applied(memory: Factors, q: Float[Tensor, "query head d_head"]) -> Float[Tensor, "query head d_head"]:
    """A memory of every key-value head, one for all queries or for each, applied to those of the heads that read it."""
    values, keys = (at_least_float32(t) for t in (memory.left, memory.right))  # [query kv d src], [query kv src d]
    grouped = at_least_float32(q).reshape(len(q), keys.shape[1], -1, q.shape[-1])  # [query kv group d]
    return torch.einsum("qkds,qksc,qkgc->qkgd", values, keys, grouped).flatten(1, 2)


def _kept(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor.detach()).cpu()
