"""What the heads see in the running pass: the visibilities of all interventions, joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.dual import attention_scores, linear_weights, merge_softmax, visible_sources, weighted_values
from metaopt_lens.interventions._change import Memory, Visibility
from metaopt_lens.models import PASS, AttentionCall, Hook, HostPass, LensModel


@dataclass(frozen=True, eq=False)
class Sources:
    """Everything that stands before one layer's tokens, and how much of it each head sees.

    One row is for all sequences where they do not differ.

    Attributes:
        values: of all slots of the pass, then of the memory if there is one.
        positions: where they stand.
        dst_positions: where the new tokens stand.
        share: 1 for what a head sees of the tokens up to each destination, 0 for what is hidden from it and for
            padding, the memory's strength for a memory. A sliding window is the softmax's and does not count here.
    """

    values: Float[Tensor, "batch src kv_head d_head"]
    positions: Int[Tensor, "row src"]
    dst_positions: Int[Tensor, "row dst"]
    share: Float[Tensor, "row head dst src"]

    def weighted(self, weights: Float[Tensor, "row head dst src"]) -> Float[Tensor, "batch dst head d_head"]:
        """``sum_i share_i w_i v_i`` for every head.

        Args:
            weights: of every source, as if it were seen.
        """
        return weighted_values((weights * self.share).expand(len(self.values), -1, -1, -1), self.values)


class Sight:
    """Which sources every head sees in the pass that is running, under some interventions.

    Made for one `intervene`, and told of every pass by its own hooks.
    """

    def __init__(self, model: LensModel, visibilities: Sequence[Visibility]) -> None:
        remembering = [v for v in visibilities if v.memory is not None]
        if len(remembering) > 1:
            raise OptionError(
                "only one meta-gradient can be applied at a time: each moves the tokens behind its own demonstrations. "
                "Make one meta-gradient of all demonstrations and select from it."
            )
        self._model = model
        self._visibilities = tuple(visibilities)
        self._remembering = remembering[0] if remembering else None
        self._pass: HostPass | None = None
        self._positions: Tensor | None = None
        self._hidden: list[tuple[Visibility, Tensor]] = []

    @property
    def is_plain(self) -> bool:
        """Whether heads see what the model's own mask says."""
        return not self._visibilities

    @property
    def host_pass(self) -> HostPass:
        """The running pass."""
        assert self._pass is not None  # the first hook of every pass sets it
        return self._pass

    def hooks(self) -> list[Hook]:
        """Hooks that make the heads see this."""
        if self.is_plain:
            return [(PASS, self._begin)]
        layers = [
            layer
            for layer in range(self._model.info.n_layers)
            if any(bool(v.heads[layer].any()) and _acts(v) for v in self._visibilities)
        ]
        return self._model.placed_hooks(self._begin, self._edit, layers=layers)

    def sources(self, layer: int, v: Float[Tensor, "batch pos kv_head d_head"]) -> Sources:
        """What a layer's heads see of the running pass.

        Args:
            layer: which.
            v: values of the new tokens.

        Raises:
            UnsupportedModelError: a sliding cache has forgotten some of the tokens.
        """
        values = self.host_pass.all_values(layer, v)
        index, valid = self.host_pass.sources(layer, values)
        if self.is_plain and bool(valid.all()):
            index, valid = index[:1], valid[:1]
        positions = index if self._positions is None else self._positions.to(index)
        dst_positions = positions[:, -v.shape[1] :]
        seen = (dst_positions[:, :, None] >= positions[:, None]) & valid[:, None]  # [row, dst, src]
        share = seen[:, None].expand(-1, self._model.info.n_heads, -1, -1)
        hidden = self._hidden_from(layer, index.shape[1])
        if hidden is not None:
            share = share & ~hidden.to(share.device)
        share = share.to(torch.promote_types(values.dtype, torch.float32))
        if self._remembering is None or self._remembering.memory is None:
            return Sources(values, positions, dst_positions, share)
        memory = self._remembering.memory
        there = memory.positions.to(positions).expand(len(positions), -1)
        before = dst_positions[:, :, None] >= there[:, None]
        heads = self._remembering.heads[layer].to(share) * memory.strength
        more = before[:, None].to(share) * heads[:, None, None]  # [row, head, dst, src]
        return Sources(
            torch.cat([values, memory.v[layer].to(values).expand(len(v), -1, -1, -1)], dim=1),
            torch.cat([positions, there], dim=1),
            dst_positions,
            torch.cat([share, more], dim=-1),
        )

    def _begin(self, host_pass: HostPass) -> Tensor | None:
        placed = [v.place(host_pass) for v in self._visibilities if v.place is not None]
        self._pass = host_pass
        self._positions = next((positions for positions in placed if positions is not None), None)
        self._hidden = [(v, v.hidden(host_pass)) for v in self._visibilities if v.hidden is not None]
        return self._positions

    def _hidden_from(self, layer: int, n_src: int) -> Bool[Tensor, "batch head dst src"] | None:
        """Slots (the last `n_src`) hidden from each head; None where no head of the layer is concerned."""
        hidden: Tensor | None = None
        for visibility, slots in self._hidden:
            heads = visibility.heads[layer]
            if bool(heads.any()):
                more = slots[:, None, :, -n_src:] & heads.to(slots.device)[:, None, None]
                hidden = more if hidden is None else hidden | more
        return hidden

    def _edit(self, call: AttentionCall) -> Tensor:
        hidden = self._hidden_from(call.layer, call.k.shape[1])
        if hidden is not None:
            hidden = hidden.to(call.z.device)
            edited = hidden.any(-1).mT[..., None]  # the other rows stay as they are, to the bit
            call = replace(call, z=torch.where(edited, call.attend(hidden)[0], call.z))
        if self._remembering is None or self._remembering.memory is None:
            return call.z
        memory, heads = self._remembering.memory, self._remembering.heads[call.layer].to(call.z.device)
        change = _change_of_z(call, memory, hidden)
        return torch.where(heads[:, None], call.z + memory.strength * change.to(call.z.dtype), call.z)


def _acts(visibility: Visibility) -> bool:
    memory = visibility.memory
    return visibility.hidden is not None or (memory is not None and memory.strength != 0.0)


def _change_of_z(
    call: AttentionCall, memory: Memory, hidden: Bool[Tensor, "batch head dst src"] | None
) -> Float[Tensor, "batch dst head d_head"]:
    """What a memory does to z at strength 1 (docs/theory.md, section 5)."""
    n, device = len(call.q), call.z.device
    k, v = (stored[call.layer].to(device).expand(n, -1, -1, -1) for stored in (memory.k, memory.v))
    positions = memory.positions.to(device)
    if memory.linear:
        scale = call.rule.scale / len(positions) if memory.scale is None else memory.scale
        visible = visible_sources(call.rule, call.dst_positions, positions.expand(n, -1))
        return scale * weighted_values(linear_weights(call.q, k, visible), v)
    return _merged(call, k, v, positions, hidden) - call.z


def _merged(
    call: AttentionCall,
    k: Float[Tensor, "batch memory_src kv_head d_head"],
    v: Float[Tensor, "batch memory_src kv_head d_head"],
    positions: Int[Tensor, " memory_src"],
    hidden: Bool[Tensor, "batch head dst src"] | None,
) -> Float[Tensor, "batch dst head d_head"]:
    """z over the sequence's own tokens joined with the softmax over the memory."""
    own = call.scores()
    if hidden is not None:
        own = own.masked_fill(hidden, -torch.inf)
    if call.rule.sinks is not None:  # counted once, on the side of the sequence
        column = call.rule.sinks.to(own)[:, None, None].expand(*own.shape[:-1], 1)
        own = torch.cat([own, column], dim=-1)
    scores = attention_scores(
        call.rule,
        call.q,
        k,
        dst_positions=call.dst_positions,
        src_positions=positions.expand(call.q.shape[0], -1),
    )
    lse = scores.logsumexp(-1)
    # Rows that see nothing of the memory: kept finite here, and left alone by the merge.
    weights = scores.masked_fill(torch.isneginf(lse)[..., None], 0.0).softmax(-1)
    return merge_softmax(call.z.to(weights.dtype), own.logsumexp(-1).mT, weighted_values(weights, v), lse.mT).to(
        call.z.dtype
    )
