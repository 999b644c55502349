"""The MLP of a pre-norm block, as far as the implicit weight update needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaopt_lens.models._hooks import Hook


@dataclass(frozen=True)
class MlpSite:
    """Where a block's MLP takes its input and leaves its output.

    Attributes:
        input_hook: a hook that hands the MLP's normed input u, ``[..., d_model]``, to a function.
        matrices: the input matrices ``[d_mlp, d_model]`` (column convention): ``"in"``, and ``"gate"`` of a gated MLP.
        products: names of the hook points on ``W u`` of each, before the activation.
        out_name: name of the hook point on the output, where an output bias would be added.
    """

    input_hook: Callable[[Callable[[Tensor], Any]], Hook]
    matrices: Mapping[str, Tensor]
    products: Mapping[str, str]
    out_name: str
