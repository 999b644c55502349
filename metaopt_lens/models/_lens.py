"""The only view of a TransformerLens model that the rest of the library has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.dual import ScoreRule
from metaopt_lens.models._attention_hooks import AttentionCallback, own_hooks, placed_hooks
from metaopt_lens.models._experts import ExpertsSite
from metaopt_lens.models._fixed_norm import FixedNorm
from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._host import Host
from metaopt_lens.models._info import ModelInfo
from metaopt_lens.models._mlp import MlpSite
from metaopt_lens.models._movable import check_movable
from metaopt_lens.models._output_head import OutputHead
from metaopt_lens.models._partial_passes import Readout, Start
from metaopt_lens.models._passes import HostPass
from metaopt_lens.models._prefix import Prefix
from metaopt_lens.models._running import hooked, keys_and_values, run, run_prefix, try_exit

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformers import PreTrainedTokenizerBase


@dataclass
class Tried:
    """What a model can do, as far as it was tried.

    Attributes:
        moves: `LensModel.check_movable` has passed.
        exits: `LensModel.early_exit` of the last residual stream gives the model's own logits; None if not tried.
        widths: how many values every block returns, if passes may start at any; None if not tried.
    """

    moves: bool = False
    exits: bool | None = None
    widths: list[int] | None = None


@final
class LensModel:
    """A TransformerLens model, wrapped. The model itself is never modified. Build one with `metaopt_lens.wrap`.

    Attributes:
        info: names and sizes.
        host: TransformerLens's own model.
        adapter: how that is read; for `metaopt_lens.models` only.
        tried: what was tried once; likewise.
    """

    def __init__(self, adapter: Host, tried: Tried | None = None) -> None:
        self.adapter = adapter
        self.tried = Tried() if tried is None else tried
        self.info: ModelInfo = adapter.info
        self.host: Any = adapter.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The host's tokenizer."""
        return self.host.tokenizer

    @property
    def device(self) -> torch.device:
        """Where input tokens go."""
        return next(self.adapter.roots[-1].parameters()).device

    @property
    def hook_points(self) -> Mapping[str, HookPoint]:
        """All hook points by name, aliases included."""
        return self.adapter.hook_points

    @property
    def head(self) -> OutputHead:
        """Final norm and unembedding."""
        return self.adapter.head()

    def score_rule(self, layer: int) -> ScoreRule:
        """How `layer` turns ``q . k`` into scores.

        Args:
            layer: counted from 0.
        """
        return self.adapter.blocks[layer].rule()

    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of every head.

        Args:
            layer: counted from 0.
        """
        return self.adapter.blocks[layer].w_o()

    def b_o(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Output bias, which belongs to no head; None where there is none.

        Args:
            layer: counted from 0.
        """
        return self.adapter.blocks[layer].b_o()

    def norm_after_attention(self, layer: int) -> FixedNorm | None:
        """The norm between a layer's attention output and the residual stream; None where there is none.

        Args:
            layer: counted from 0.
        """
        return self.adapter.blocks[layer].norm_after_attention()

    def has_bias(self, projection: str, layer: int) -> bool:
        """Whether projection `"q"`, `"k"`, `"v"` or `"o"` of a layer has a bias.

        Args:
            projection: its name.
            layer: counted from 0.
        """
        return self.adapter.blocks[layer].has_bias(projection)

    def mlp_site(self, layer: int) -> MlpSite:
        """The layer's MLP.

        Args:
            layer: counted from 0.

        Raises:
            UnsupportedModelError: there is none, or one of another kind than plain and gated.
        """
        mlp = self.block_mlp(layer)
        if isinstance(mlp, MlpSite):
            return mlp
        why = "it is attention-only" if mlp is None else "the MLP is a mixture of experts"
        raise UnsupportedModelError(f"the MLP in layer {layer} of {self.info.name} cannot be read: {why}.")

    def block_mlp(self, layer: int) -> MlpSite | ExpertsSite | None:
        """What follows or accompanies the layer's attention; None where nothing does.

        Args:
            layer: counted from 0.

        Raises:
            UnsupportedModelError: something of an unknown kind.
        """
        mlp = self.adapter.blocks[layer].mlp()
        if isinstance(mlp, str):
            raise UnsupportedModelError(f"the MLP in layer {layer} of {self.info.name} cannot be read: {mlp}.")
        return mlp

    def early_exit(
        self, residual: Float[Tensor, "*batch d_model"], tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "*batch token"]:
        """Final norm, unembedding and soft-cap applied to any residual stream; after the last block, the logits.

        Args:
            residual: any residual stream, at any positions.
            tokens: only these tokens' logits; None for the whole vocabulary.
        """
        return self.head.logits(residual, tokens)

    @property
    def exits_exactly(self) -> bool:
        """Whether `early_exit` of the last residual stream gives the model's own logits.

        Tried once. If so, a pass that reads logits at some positions computes no others.
        """
        if self.tried.exits is None:
            self.tried.exits = try_exit(self)
        return self.tried.exits

    def hook_name(self, kind: str, layer: int) -> str:
        """Name of a hook point.

        Args:
            kind: `"q"`, `"k"`, `"v"` (before rotary and QK-norm), `"z"`, `"pattern"`, `"attn_out"` (after W_O, before
                any norm), `"mlp_out"`, `"resid_pre"`, `"resid_mid"` (between attention and MLP, where they follow
                one another) or `"resid_post"`.
            layer: which.
        """
        return self.adapter.blocks[layer].hook_name(kind)

    def residual_hook(self, end: str, layer: int) -> str:
        """Name of the hook point on the residual stream before (`"pre"`), within (`"mid"`) or after (`"post"`).

        Args:
            end: where in the block.
            layer: counted from 0.
        """
        return self.hook_name(f"resid_{end}", layer)

    def attention_input_hook(self, layer: int, use: Callable[[Tensor], None]) -> Hook:
        """A hook that hands the attention input x, ``[batch, pos, d_model]``, to `use`.

        Args:
            layer: counted from 0.
            use: called with x in every pass.
        """
        return self.adapter.blocks[layer].attention_input_hook(use)

    def attention_hooks(self, layer: int, use: AttentionCallback, *, prefix: Prefix | None = None) -> list[Hook]:
        """Hooks for `run` that call `use` with the layer's `AttentionCall`; what it returns replaces z.

        Args:
            layer: which.
            use: called just before W_O.
            prefix: the one that `run` is given.
        """
        return own_hooks(self.adapter, layer, use, prefix)

    def placed_hooks(
        self,
        place: Callable[[HostPass], Tensor | None],
        use: AttentionCallback,
        *,
        layers: Sequence[int] | None = None,
    ) -> list[Hook]:
        """Hooks for any forward pass of the host, also padded, cached and generating, with positions of our choosing.

        Args:
            place: called before every pass; returns the position every slot is to have, ``[batch, slot]``, or None to
                leave them as they are. The host then computes with these positions; where its own masks or biases
                go by the slot instead (sliding window, ALiBi), z is recomputed.
            use: called with the layer's `AttentionCall` just before W_O; what it returns replaces z.
            layers: where to call `use`; all by default.
        """
        return placed_hooks(self.adapter, place, use, range(self.info.n_layers) if layers is None else layers)

    def hooked(self, hooks: Sequence[Hook]) -> AbstractContextManager[None]:
        """Attach hooks for the length of the block, names checked first.

        Args:
            hooks: pairs of hook name and function.
        """
        return hooked(self.adapter, hooks)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        hooks: Sequence[Hook] = (),
        prefix: Prefix | None = None,
        start: Start | None = None,
        read: Readout | None = None,
        until: int | None = None,
        stop_after_attention: bool = False,
        stop_after_blocks: bool = False,
        grad: bool = False,
    ) -> Float[Tensor, "batch chosen token"] | None:
        """One forward pass in eval mode.

        Args:
            tokens: token ids; batches of unequal length are padded on the right (causal: padding is never seen).
            hooks: what to attach for this pass.
            prefix: run `tokens` behind this shared prefix.
            start: begin at a block, with a residual stream computed before.
            read: compute the logits of these positions and tokens only.
            until: end the pass before this block and return the residual stream that enters it, to start there later.
            stop_after_attention: end the pass at the last layer's z and return None: no last MLP, no unembedding.
            stop_after_blocks: end it at the last residual stream and return None: no unembedding.
            grad: keep the graph.

        Returns:
            Logits, of what `read` names if it is given; the residual stream, ``[batch, pos, d_model]``, with `until`;
            None if the pass was ended within the last block.

        Raises:
            OptionError: `start` or `read` does not fit the tokens, or no block lies between `start` and `until`.
            UnsupportedModelError: the host cannot start at a block.
        """
        return run(
            self,
            tokens,
            hooks=hooks,
            prefix=prefix,
            start=start,
            read=read,
            until=until,
            stop_after_attention=stop_after_attention,
            stop_after_blocks=stop_after_blocks,
            grad=grad,
        )

    def run_prefix(self, tokens: Int[Tensor, " pos"], *, hooks: Sequence[Hook] = (), grad: bool = False) -> Prefix:
        """Run tokens once and keep every layer's keys and values (docs/theory.md, section 5).

        Args:
            tokens: ids.
            hooks: what to attach for this pass.
            grad: keep the graph.
        """
        return run_prefix(self, tokens, hooks=hooks, grad=grad)

    def keys_and_values(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        start: Start,
        prefix: Prefix | None = None,
        hooks: Sequence[Hook] = (),
    ) -> tuple[Float[Tensor, "batch pos kv_head d_head"], Float[Tensor, "batch pos kv_head d_head"]]:
        """One layer's keys (as the scores see them) and values, from the residual stream that enters it.

        Args:
            tokens: ids, padded on the right.
            start: the layer, and what enters it.
            prefix: where the tokens stand: behind this.
            hooks: what to attach for this pass.

        Raises:
            OptionError: `start` does not fit the tokens.
            UnsupportedModelError: the host cannot start at a block.
        """
        return keys_and_values(self, tokens, start=start, prefix=prefix, hooks=hooks)

    def check_window(self, n_tokens: int, what: str = "the prompt") -> None:
        """Raise `ContextWindowError` if `n_tokens` do not fit the context window.

        Args:
            n_tokens: length of the prompt.
            what: what errors call it.
        """
        self.info.check_window(n_tokens, what)

    def check_same(self, other: ModelInfo, what: str) -> None:
        """Raise `ModelMismatchError` unless `other` has this model's sizes and parametrisation.

        Args:
            other: the model that something was made with.
            what: what errors call it.
        """
        self.info.check_same(other, what)

    def check_movable(self) -> None:
        """Require that moved tokens have the queries and keys they have where they are moved to.

        Raises:
            UnsupportedModelError: they have not.
        """
        if not self.tried.moves:
            check_movable(self)
            self.tried.moves = True

    def __repr__(self) -> str:
        return f"LensModel({self.info})"
