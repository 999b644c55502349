"""Whether a host computes with the positions it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.models._attention_call import AttentionCall
from metaopt_lens.models._passes import HostPass

if TYPE_CHECKING:
    from metaopt_lens.models._lens import LensModel


def check_movable(model: LensModel) -> None:
    """Require that moved tokens have the queries and keys they have where they are moved to.

    Tried on the first layer, whose queries and keys depend on token and position alone.

    Raises:
        UnsupportedModelError: the host takes no positions, or does not compute with them.
    """
    n, gap = 6, 3
    tokens = (torch.arange(n) * 7919 + 5) % model.info.d_vocab
    found = []
    for kept in (range(n), [0, *range(1 + gap, n)]):
        moved = torch.tensor(kept)
        calls: list[AttentionCall] = []

        def place(host_pass: HostPass, moved: Tensor = moved) -> Tensor | None:
            return None if len(moved) == n else moved[None].to(host_pass.valid.device)

        hooks = model.placed_hooks(place, calls.append, layers=[0])
        model.run(tokens[moved][None], hooks=hooks, stop_after_attention=True)
        found.append([calls[0].q[0, 1 - n + gap :], calls[0].k[0, 1 - n + gap :]])
    for there, here in zip(*found, strict=True):
        error = (there - here).abs().max() / there.abs().max().clamp_min(1e-30)
        if error > (1e-4 if model.info.dtype in {"float32", "float64"} else 5e-2):
            raise UnsupportedModelError(
                f"{model.info.name} ({model.info.architecture}) does not compute with the positions it is given (off "
                f"by {float(error):.0e}): a zero-shot prompt cannot be put where it stands in context. Run it "
                "behind the demonstrations' cache instead: MetaGradient.run(model, tokens)."
            )
