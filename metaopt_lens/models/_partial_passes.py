"""Passes that run only what is needed: from a block upwards, logits only where they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.models._host import Block


@dataclass(frozen=True, eq=False)
class Start:
    """Where a pass starts: blocks below `layer` are not run, and none of their hooks fires.

    Attributes:
        layer: the first block that is run.
        residual: the residual stream that enters it, as ``hook_name("resid_pre", layer)`` shows it.
    """

    layer: int
    residual: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, eq=False)
class Readout:
    """Which logits of a pass are wanted; the others are not computed.

    Attributes:
        positions: of every sequence, counted from the first token of the pass.
        tokens: ids whose logits are wanted; None for the whole vocabulary.
    """

    positions: Int[Tensor, "batch chosen"]
    tokens: Int[Tensor, " token"] | None = None

    def rows(self, stream: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch chosen d"]:
        """The chosen positions of anything that has one row for every token.

        Args:
            stream: residual stream at all positions.
        """
        at = self.positions.to(stream.device)
        return stream[torch.arange(len(at), device=stream.device)[:, None], at]

    def of(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch chosen token"]:
        """The same numbers, out of the logits of everything.

        Args:
            logits: of the whole pass.
        """
        rows = self.rows(logits)
        return rows if self.tokens is None else rows[..., self.tokens.to(rows.device)]


@contextmanager
def skipping(blocks: Sequence[Block], widths: Sequence[int]) -> Iterator[None]:
    """Within it these blocks hand on what they are given.

    Args:
        blocks: which.
        widths: how many values each returns: 0 for a bare tensor, otherwise the length of the tuple.
    """

    def handing_on(width: int) -> Any:
        def forward(*args: Any, **options: Any) -> Any:
            stream = args[0] if args else options["hidden_states"]
            return stream if width == 0 else (stream, *[None] * (width - 1))

        return forward

    # Into the instance's own dictionary: a bridge would pass an assignment on to the module that it wraps.
    own = [vars(block.block) for block in blocks]
    before = [attributes.get("forward") for attributes in own]
    try:
        for attributes, width in zip(own, widths, strict=True):
            attributes["forward"] = handing_on(width)
        yield
    finally:
        for attributes, forward in zip(own, before, strict=True):
            attributes.pop("forward", None)
            if forward is not None:
                attributes["forward"] = forward


@contextmanager
def recording_widths(blocks: Sequence[Block]) -> Iterator[list[int]]:
    """Fills a list with how many values each block returns in a pass; see `skipping`."""
    widths = [0] * len(blocks)

    def record(layer: int) -> Any:
        def after(_: Any, args: Any, out: Any) -> None:  # noqa: ARG001
            widths[layer] = len(out) if isinstance(out, tuple) else 0

        return after

    handles = [block.block.register_forward_hook(record(layer)) for layer, block in enumerate(blocks)]
    try:
        yield widths
    finally:
        for handle in handles:
            handle.remove()
