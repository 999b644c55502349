"""What an adapter says about one of TransformerLens's classes. `hooked.py`, `bridge.py` and `native.py` each do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from metaopt_lens.dual import ScoreRule
from metaopt_lens.models._experts import ExpertsSite
from metaopt_lens.models._fixed_norm import FixedNorm
from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._info import ModelInfo
from metaopt_lens.models._mlp import MlpSite
from metaopt_lens.models._output_head import OutputHead
from metaopt_lens.models._passes import HostPass
from metaopt_lens.models._prefix import Prefix

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint

Use = Callable[[Tensor], None]
# Given a tensor of the running pass, ``[batch, pos, ...]``: the positions of its tokens, one row for all or for each.
Positions = Callable[[Tensor], Tensor]


@runtime_checkable
class Block(Protocol):
    """One block of a host: the names of its hook points, its score rule, its output projection, its MLP."""

    def rule(self) -> ScoreRule:
        """How the layer turns ``q . k`` into scores."""
        ...

    @property
    def block(self) -> Any:
        """TransformerLens's own module."""
        ...

    @property
    def pattern_before_z(self) -> bool:
        """Whether the attention pattern is seen before z in a forward pass."""
        ...

    def w_o(self) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of every head."""
        ...

    def b_o(self) -> Float[Tensor, " d_model"] | None:
        """Output bias, which belongs to no head; None where there is none."""
        ...

    def norm_after_attention(self) -> FixedNorm | None:
        """The norm between the attention output and the residual stream; None where there is none."""
        ...

    def mlp(self) -> MlpSite | ExpertsSite | str | None:
        """The MLP, or why it cannot be looked at; None where there is none."""
        ...

    def has_bias(self, projection: str) -> bool:
        """Whether projection ``"q"``, ``"k"``, ``"v"`` or ``"o"`` has a bias."""
        ...

    def hook_name(self, kind: str) -> str:
        """Name of the hook point of `kind`; see `LensModel.hook_name`."""
        ...

    def attention_input_hook(self, use: Use) -> Hook:
        """A hook that hands the attention input x, ``[batch, pos, d_model]``, to `use`."""
        ...

    def query_key_hooks(self, use_q: Use, use_k: Use, positions: Positions) -> list[Hook]:
        """Hooks that hand over q and k as the scores see them, before z is computed.

        Keys are those of the new tokens, or of all where the host shows the cached ones too.
        """
        ...


@runtime_checkable
class Host(Protocol):
    """A model of TransformerLens's own, described; nothing here is computed twice or kept."""

    @property
    def model(self) -> Any:
        """TransformerLens's own object. Only adapters look inside."""
        ...

    @property
    def info(self) -> ModelInfo:
        """Names and sizes."""
        ...

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        """Modules that between them hold all modules of the host."""
        ...

    @property
    def hook_points(self) -> Mapping[str, HookPoint]:
        """All hook points by name, aliases included."""
        ...

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks, lowest first."""
        ...

    def head(self) -> OutputHead:
        """Final norm and unembedding."""
        ...

    def forward(self, tokens: Int[Tensor, "batch pos"], prefix: Prefix | None) -> Tensor:
        """One forward pass, behind `prefix` if given; returns logits."""
        ...

    def fill(self, tokens: Int[Tensor, "1 pos"]) -> Callable[[], tuple[Tensor, ...]]:
        """A forward pass that may be stopped early; what it returns gives the keys in the host's own cache.

        An empty tuple says that these are the keys as the scores see them.
        """
        ...

    def watching(self, begin: Callable[[HostPass], Tensor | None]) -> AbstractContextManager[None]:
        """Call `begin` before every forward pass; the host takes the positions of all slots from it (None: its own).

        Raises (in the pass):
            UnsupportedModelError: the host takes no positions.
        """
        ...
