"""The MLP of a block: where it takes its input and leaves its output, and its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from metaopt_lens.models._hooks import Hook


@dataclass(frozen=True, eq=False)
class MlpSite:
    """A plain or gated MLP.

    Attributes:
        input_hook: a hook that hands the MLP's input u, ``[..., d_model]``, normed where the block norms it, to a
            function.
        matrices: the input matrices ``[d_mlp, d_model]`` (column convention): ``"in"``, and ``"gate"`` of a gated MLP.
        products: names of the hook points on ``W u`` of each, before the activation.
        w_out: the output matrix (column convention).
        out_name: name of the hook point on the output, where an output bias would be added.
        parallel: whether attention and MLP read the same residual stream.
        is_normed: whether the MLP's output is normalised before it is added to the residual stream.
    """

    input_hook: Callable[[Callable[[Tensor], Any]], Hook]
    matrices: Mapping[str, Float[Tensor, "d_mlp d_model"]]
    products: Mapping[str, str]
    w_out: Float[Tensor, "d_model d_mlp"]
    out_name: str
    parallel: bool
    is_normed: bool
