"""The MLP of a block: where it takes its input and leaves its output, and its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from metaopt_lens.models._hooks import Hook


@dataclass(frozen=True)
class OutputNorm:
    """The norm that an MLP's output goes through before it is added to the residual stream.

    Attributes:
        normalized_name: name of the hook point on the normalised output, before the norm's own factor and bias.
        out_name: name of the hook point on what is added to the residual stream.
    """

    normalized_name: str
    out_name: str


@dataclass(frozen=True, eq=False)
class MlpSite:
    """A plain or gated MLP.

    Attributes:
        input_hook: a hook that hands the MLP's input u, ``[..., d_model]``, normed where the block norms it, to a
            function.
        matrices: the input matrices ``[d_mlp, d_model]`` (column convention): ``"in"``, and ``"gate"`` of a gated MLP.
        products: names of the hook points on ``W u`` of each, before the activation.
        hidden_name: name of the hook point on what the output matrix is applied to.
        w_out: the output matrix (column convention).
        out_name: name of the hook point on the output, where an output bias would be added.
        parallel: whether attention and MLP read the same residual stream.
        norm: of the output; None where it is added to the residual stream as it is.
    """

    input_hook: Callable[[Callable[[Tensor], Any]], Hook]
    matrices: Mapping[str, Float[Tensor, "d_mlp d_model"]]
    products: Mapping[str, str]
    hidden_name: str
    w_out: Float[Tensor, "d_model d_mlp"]
    out_name: str
    parallel: bool
    norm: OutputNorm | None

    @property
    def is_normed(self) -> bool:
        """Whether the MLP's output is normalised before it is added to the residual stream."""
        return self.norm is not None
