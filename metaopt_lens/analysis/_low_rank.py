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

from metaopt_lens.analysis._matrices import Factors, Spectrum, overlap, spectrum
from metaopt_lens.analysis._similarity import difference
from metaopt_lens.dual import at_least_float32
from metaopt_lens.finetuning import UpdatedMemory, delta_w_ft
from metaopt_lens.runs import Run, delta_w_icl

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


@dataclass(frozen=True, eq=False)
class MemoryBatch:
    """dW_FT of some queries of one demonstration set, and what is kept of its singular value decomposition.

    Attributes:
        memories: keys and values of each query's Z with and without the update.
        seen: of every query, which sources of Z its last token sees, ``[layer, src]``.
        subspace_dim: dimension of the singular subspaces.
    """

    memories: tuple[UpdatedMemory, ...]
    seen: tuple[Bool[Tensor, "layer _"], ...]
    subspace_dim: int

    @classmethod
    def of(cls, memories: Sequence[UpdatedMemory], icl: Sequence[Run], *, subspace_dim: int) -> MemoryBatch:
        """The memories of some queries.

        Args:
            memories: of the queries.
            icl: their in-context runs.
            subspace_dim: dimension of the singular subspaces.
        """
        seen = tuple(run.visible[:, -1][:, ~run.in_demos] for run in icl)
        return cls(tuple(memories), seen, subspace_dim)

    def matrices(self, layer: int) -> list[FactoredMatrix]:
        """dW_FT of every query, all key-value heads."""
        return [delta_w_ft(m, layer, seen[layer]) for m, seen in zip(self.memories, self.seen, strict=True)]

    @cached_property
    def leading(self) -> list[Spectrum]:
        """Of every layer: all singular values, but the leading vectors only."""
        layers = range(len(self.seen[0]))
        return [spectrum(stack_factors(self.matrices(layer))).leading(self.subspace_dim) for layer in layers]

    @cached_property
    def changed(self) -> Bool[Tensor, "query layer kv_head"]:
        """Whether the update changed a head's keys or values by more than rounding; otherwise dW_FT is rounding."""
        pairs = zip(self.memories, self.seen, strict=True)
        return torch.stack([torch.stack([_changed(m, i, row) for i, row in enumerate(s)]) for m, s in pairs]).cpu()

    def rotated(self, *, seed: int) -> MemoryBatch:
        """The same with what finetuning changed turned at random; see `rotated`.

        Args:
            seed: of the rotations.
        """
        return dataclasses.replace(self, memories=tuple(rotated(self.memories, seed=seed)))


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
        matrices = memory.matrices(layer)
        left, right = overlap(first, second, k=memory.subspace_dim)
        of_heads = {
            "frobenius": first.cosine_with(stack_factors(matrices), norm=second.norm),
            "left": left,
            "right": right,
            "rank_ft": second.effective_rank,
            "rank_icl": first.effective_rank.expand(len(icl), -1),
        }
        row = {name: _kept(t).repeat_interleave(group, dim=1) for name, t in of_heads.items()}
        pairs = zip(matrices, icl, strict=True)
        row["linear_ft"] = _kept(torch.stack([_applied(m, run.q[-1, layer]) for m, run in pairs]))
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
    for layer in range(len(icl[0].own_k)):
        keys = [run.own_k[layer, -1].repeat_interleave(group, dim=0) for run in icl]
        pairs = list(zip(icl, memory.matrices(layer), keys, strict=True))
        first.append(_kept(torch.stack([_applied(delta_w_icl(run, layer), key) for run, _, key in pairs])))
        second.append(_kept(torch.stack([_applied(matrix, key) for _, matrix, key in pairs])))
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
    """dW_ICL of every layer; one matrix for all queries where they see the same demonstration tokens.

    Args:
        icl: in-context runs of queries behind the same demonstrations.
    """
    demos = icl[0].tokens.demonstrations.slice
    visible = [run.visible[:, -1, demos] for run in icl]  # each [layer, src]
    for layer in range(len(icl[0].own_k)):
        same = all(torch.equal(row[layer], visible[0][layer]) for row in visible)
        yield spectrum(stack_factors([delta_w_icl(run, layer) for run in (icl[:1] if same else icl)]))


def rotated(memories: Sequence[UpdatedMemory], *, seed: int) -> list[UpdatedMemory]:
    """The memories with what finetuning changed turned at random, one rotation for each layer and head.

    dW_FT also holds the model's own keys and values, which resemble those of the demonstrations whatever was learned: a
    random subspace would be too easy a null. A Gaussian update is as likely as any rotation of it.

    Args:
        memories: of queries behind the same demonstrations; all are turned alike, as one update changed them all.
        seed: of the rotations.
    """
    n_layers, _, n_heads, d_head = memories[0].k.shape
    generator = torch.Generator().manual_seed(seed)
    rotations = []
    for _ in ("k", "v"):
        q, r = torch.linalg.qr(torch.randn(n_layers, n_heads, d_head, d_head, generator=generator, dtype=torch.float64))
        rotations.append(q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :])  # uniform: the signs of R are fixed

    def turned(new: Tensor, old: Tensor, rotation: Tensor) -> Tensor:
        return old + torch.einsum("lshd,lhde->lshe", new - old, rotation.to(new))

    return [
        dataclasses.replace(
            memory,
            k_updated=turned(memory.k_updated, memory.k, rotations[0]),
            v_updated=turned(memory.v_updated, memory.v, rotations[1]),
        )
        for memory in memories
    ]


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


def _changed(memory: UpdatedMemory, layer: int, seen: Bool[Tensor, " src"]) -> Bool[Tensor, " kv_head"]:
    """Whether an update changed a head's keys or values by more than rounding."""
    pairs = ((memory.k_updated, memory.k), (memory.v_updated, memory.v))
    # [src kv_head d_head] -> [kv_head src * d_head]
    flat = [[t[layer][seen].transpose(0, 1).flatten(1) for t in pair] for pair in pairs]
    keys, values = (~difference(new, old).isnan().any(-1) for new, old in flat)
    return keys | values


def _applied(memory: FactoredMatrix, q: Float[Tensor, "head d_head"]) -> Float[Tensor, "head d_head"]:
    """A memory of every key-value head, applied to the queries of the heads that read it."""
    values, keys = (at_least_float32(t) for t in (memory.A, memory.B))  # [kv_head, d_head, src], [kv_head, src, d_head]
    grouped = at_least_float32(q).reshape(len(keys), -1, q.shape[-1])  # [kv_head, group, d_head]
    return torch.einsum("kds,ksc,kgc->kgd", values, keys, grouped).flatten(0, 1)


def _kept(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor.detach()).cpu()
