"""What the rest of the library may know about a model: sizes, one primitive that runs it, one that sees attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metaopt_lens._errors import ContextWindowError, ModelMismatchError, UnsupportedModelError
from metaopt_lens.dual import ScoreRule, attention_scores, softmax_with_sink, visible_sources
from metaopt_lens.models._hooks import Hook, StopForward, attached, check_hook_names, inference_state
from metaopt_lens.models._mlp import MlpSite
from metaopt_lens.models._passes import PASS, HostPass, PlacedCall

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelInfo:
    """Names and sizes of a wrapped model; stored with every result.

    Attributes:
        processing: what weight processing was found (`"folded norms"`, `"folded value biases"`); empty for raw weights.
        positions: how positions enter: `"learned"`, `"rotary"`, `"alibi"` or `"none"`.
        quantization: what the weights were de-quantised from, such as `"Q4_1 GGUF"`; `"none"` if not at all.
    """

    name: str
    host: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    dtype: str
    positions: str
    processing: tuple[str, ...] = ()
    quantization: str = "none"

    @property
    def is_processed(self) -> bool:
        """Whether weights were folded, which changes the split (docs/theory.md, section 1)."""
        return bool(self.processing)

    @property
    def weights(self) -> str:
        """What was done to the weights, in words."""
        done = " and ".join(self.processing) if self.is_processed else "as trained"
        return done if self.quantization == "none" else f"{done}, de-quantised from {self.quantization}"


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in a running forward pass, seen just before W_O.

    Sources are the prefix, if any, followed by the tokens of this pass; destinations are the tokens of this pass.

    Attributes:
        q, k: as the scores see them (after QK-norm and rotary).
        v: values; z: the heads' outputs before W_O.
        pattern: the model's attention probabilities (rebuilt from q and k where the host shows them only after z).
        rule: how the layer scores.
        offset: position of the first token of this pass (length of the prefix).
    """

    layer: int
    q: Float[Tensor, "batch dst head d_head"]
    k: Float[Tensor, "batch src kv_head d_head"]
    v: Float[Tensor, "batch src kv_head d_head"]
    pattern: Float[Tensor, "batch head dst src"]
    z: Float[Tensor, "batch dst head d_head"]
    rule: ScoreRule
    offset: int

    @property
    def dst_positions(self) -> Int[Tensor, " dst"]:
        """Position index of every destination."""
        return torch.arange(self.offset, self.offset + self.q.shape[1], device=self.q.device)

    @property
    def src_positions(self) -> Int[Tensor, " src"]:
        """Position index of every source."""
        return torch.arange(self.k.shape[1], device=self.k.device)

    @property
    def visible(self) -> Bool[Tensor, "dst src"]:
        """Causal and window mask."""
        return visible_sources(self.rule, self.dst_positions, self.src_positions)

    def scores(self) -> Float[Tensor, "batch head dst src"]:
        """Final scores before the softmax, rebuilt from q and k."""
        return attention_scores(
            self.rule, self.q, self.k, dst_positions=self.dst_positions, src_positions=self.src_positions
        )


@dataclass(frozen=True)
class Prefix:
    """Keys and values of tokens that were run once and are shared by many continuations.

    Attributes:
        k: per layer, keys as the scores see them. v: per layer, values.
        host_k: per layer, keys as the host's own cache holds them (unrotated on a HookedTransformer).
    """

    k: tuple[Float[Tensor, "pos kv_head d_head"], ...]
    v: tuple[Float[Tensor, "pos kv_head d_head"], ...]
    host_k: tuple[Float[Tensor, "pos kv_head d_head"], ...]

    @property
    def n_tokens(self) -> int:
        """How many tokens the prefix holds."""
        return int(self.k[0].shape[0])

    def truncate(self, n_tokens: int) -> Prefix | None:
        """The first `n_tokens` of the prefix (causal: they do not depend on what follows); None for 0."""
        if n_tokens == 0:
            return None
        return replace(
            self,
            k=tuple(t[:n_tokens] for t in self.k),
            v=tuple(t[:n_tokens] for t in self.v),
            host_k=tuple(t[:n_tokens] for t in self.host_k),
        )


@runtime_checkable
class Intervention(Protocol):
    """A change to a model that is nothing but hooks: a weight update, a meta-gradient, a knock-out, momentum."""

    def hooks(self, model: AttentionModel) -> list[Hook]:
        """The hooks that make the change; raises if it was made for another model."""
        ...


AttentionCallback = Callable[[AttentionCall], Tensor | None]


class AttentionModel(ABC):
    """A TransformerLens model, wrapped: the only view of it that the rest of the library has.

    The wrapped model is never modified. Build one with `metaopt_lens.wrap`.
    """

    info: ModelInfo
    host: Any  # TransformerLens's own class; only the two adapters look inside
    _moves: bool = False  # whether `check_movable` has passed

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The host's tokenizer."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where input tokens go."""

    @property
    @abstractmethod
    def roots(self) -> tuple[nn.Module, ...]:
        """Modules that between them hold all modules of the host."""

    @property
    @abstractmethod
    def hook_points(self) -> Mapping[str, HookPoint]:
        """All hook points by name, aliases included."""

    @abstractmethod
    def score_rule(self, layer: int) -> ScoreRule:
        """How `layer` turns ``q . k`` into scores."""

    @abstractmethod
    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of every head."""

    @abstractmethod
    def b_o(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Output bias, which belongs to no head; None where there is none."""

    @abstractmethod
    def hook_name(self, kind: str, layer: int) -> str:
        """Name of the hook point of `kind`: `"q"`, `"k"`, `"v"` (before rotary and QK-norm), `"z"`, `"pattern"`,
        `"attn_out"` (attention output after W_O, before any norm)."""

    @abstractmethod
    def has_bias(self, projection: str, layer: int) -> bool:
        """Whether projection `"q"`, `"k"`, `"v"` or `"o"` of a layer has a bias."""

    @abstractmethod
    def residual_hook(self, end: str, layer: int) -> str:
        """Name of the hook point on the residual stream before (`"pre"`) or after (`"post"`) a block."""

    @abstractmethod
    def early_exit(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm, unembedding and soft-cap applied to any residual stream; after the last block, the logits."""

    @abstractmethod
    def mlp_site(self, layer: int) -> MlpSite:
        """The MLP that follows the layer's attention; raises `UnsupportedModelError` outside pre-norm blocks."""

    @abstractmethod
    def attention_input_hook(self, layer: int, use: Callable[[Tensor], None]) -> Hook:
        """A hook that hands the attention input x, ``[batch, pos, d_model]``, to `use`."""

    @abstractmethod
    def query_key_hooks(
        self,
        layer: int,
        use_q: Callable[[Tensor], None],
        use_k: Callable[[Tensor], None],
        *,
        offset: int,
        positions: Callable[[], Tensor] | None = None,
    ) -> list[Hook]:
        """Hooks that hand over q and k of the new tokens as the scores see them, before z is computed.

        Args:
            offset: position of the first new token.
            positions: ``[batch, pos]`` of the running pass, where they are not `offset` and upwards.
        """

    @property
    @abstractmethod
    def pattern_before_z(self) -> bool:
        """Whether the attention pattern is seen before z in a forward pass."""

    @abstractmethod
    def _forward(self, tokens: Int[Tensor, "batch pos"], prefix: Prefix | None) -> Tensor:
        """One forward pass of the host, behind `prefix` if given; returns logits."""

    @abstractmethod
    def _forward_prefix(self, tokens: Int[Tensor, "1 pos"]) -> Callable[[], tuple[Tensor, ...]]:
        """Prepare a forward pass that fills a host cache; see `run_prefix`."""

    @abstractmethod
    def _refuse_immovable(self) -> None:
        """Raise `UnsupportedModelError` if the host takes no positions."""

    @abstractmethod
    def _watching(self, begin: Callable[[HostPass], Tensor | None]) -> AbstractContextManager[None]:
        """Call `begin` before every forward pass; the host takes the positions of all slots from it (None: its own)."""

    @abstractmethod
    def _move_hooks(self, current: Callable[[], tuple[HostPass, Tensor | None]]) -> list[Hook]:
        """Hooks that move the host's tokens to the positions of the running pass, where `_watching` cannot."""

    # ---- built on the primitives above --------------------------------------------------------------------------

    def check_window(self, n_tokens: int, what: str = "the prompt") -> None:
        """Raise `ContextWindowError` if `n_tokens` do not fit the context window."""
        if n_tokens > self.info.n_ctx:
            raise ContextWindowError(
                f"{what} has {n_tokens} tokens, but the context window of {self.info.name} is {self.info.n_ctx}."
            )

    def check_same(self, other: ModelInfo, what: str) -> None:
        """Raise `ModelMismatchError` unless `other` has this model's sizes and parametrisation."""
        fields = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "processing")
        for field in fields:
            mine, theirs = getattr(self.info, field), getattr(other, field)
            if mine != theirs:
                raise ModelMismatchError(
                    f"{what} was made with {other.name} ({field} = {theirs}); {self.info.name} has {field} = {mine}."
                )

    def attention_hooks(self, layer: int, use: AttentionCallback, *, prefix: Prefix | None = None) -> list[Hook]:
        """Hooks that call `use` with the layer's `AttentionCall` just before W_O; what it returns replaces z."""
        seen: dict[str, Tensor] = {}
        rule = self.score_rule(layer)
        offset = 0 if prefix is None else prefix.n_tokens

        def keep(key: str) -> Callable[[Tensor], None]:
            def store(tensor: Tensor) -> None:
                seen[key] = tensor

            return store

        def with_prefix(tensor: Tensor, stored: tuple[Tensor, ...] | None) -> Tensor:
            if stored is None:
                return tensor
            head = stored[layer].expand(tensor.shape[0], -1, -1, -1)
            return torch.cat([head, tensor], dim=1)

        def at_z(z: Tensor) -> Tensor | None:
            q = seen.pop("q")
            k = with_prefix(seen.pop("k"), prefix.k if prefix else None)
            v = with_prefix(seen.pop("v"), prefix.v if prefix else None)
            pattern = seen.pop("pattern") if self.pattern_before_z else _rebuilt_pattern(rule, q, k, offset)
            return use(AttentionCall(layer, q=q, k=k, v=v, pattern=pattern, z=z, rule=rule, offset=offset))

        hooks = self.query_key_hooks(layer, keep("q"), keep("k"), offset=offset)
        hooks.append((self.hook_name("v", layer), keep("v")))
        if self.pattern_before_z:
            hooks.append((self.hook_name("pattern", layer), keep("pattern")))
        return [*hooks, (self.hook_name("z", layer), at_z)]

    def check_movable(self) -> None:
        """Require that moved tokens have the queries and keys they have where they are moved to; raises
        `UnsupportedModelError` otherwise.

        Tried once, on the first layer, whose queries and keys depend on token and position alone.
        """
        if self._moves:
            return
        self._refuse_immovable()
        n, gap = 6, 3
        tokens = (torch.arange(n) * 7919 + 5) % self.info.d_vocab
        found = []
        for kept in (range(n), [0, *range(1 + gap, n)]):
            moved = torch.tensor(kept)
            calls: list[PlacedCall] = []

            def place(host_pass: HostPass, moved: Tensor = moved) -> Tensor | None:
                return None if len(moved) == n else moved[None].to(host_pass.valid.device)

            hooks = self.placed_hooks(place, calls.append, layers=[0])
            self.run(tokens[moved][None], hooks=hooks, stop_after_attention=True)
            found.append([calls[0].q[0, 1 - n + gap :], calls[0].k[0, 1 - n + gap :]])
        for there, here in zip(*found, strict=True):
            error = (there - here).abs().max() / there.abs().max().clamp_min(1e-30)
            if error > (1e-4 if self.info.dtype in {"float32", "float64"} else 5e-2):
                raise UnsupportedModelError(
                    f"{self.info.name} ({self.info.architecture}) does not compute with the positions it is given (off "
                    f"by {float(error):.0e}): a zero-shot prompt cannot be put where it stands in context. Run it "
                    "behind the demonstrations' cache instead: MetaGradient.run(model, tokens)."
                )
        self._moves = True

    def placed_hooks(
        self,
        place: Callable[[HostPass], Tensor | None],
        use: Callable[[PlacedCall], Tensor | None],
        *,
        layers: Sequence[int] | None = None,
    ) -> list[Hook]:
        """Hooks for any forward pass of the host, also padded, cached and generating, with positions of our choosing.

        Args:
            place: called before every pass; returns the position every slot is to have, ``[batch, slot]``, or None to
                leave them as they are. The host then computes with these positions; where its own masks or biases
                go by the slot instead (sliding window, ALiBi), z is computed anew.
            use: called with the layer's `PlacedCall` just before W_O; what it returns replaces z.
            layers: where to call `use`; all by default.
        """
        running: list[tuple[HostPass, Tensor | None]] = []

        def begin(host_pass: HostPass) -> Tensor | None:
            running[:] = [(host_pass, place(host_pass))]
            return running[0][1]

        hooks: list[Hook] = [(PASS, begin), *self._move_hooks(lambda: running[0])]
        for layer in range(self.info.n_layers):
            chosen = use if layers is None or layer in layers else None
            hooks += self._placed_layer(layer, lambda: running[0], chosen)
        return hooks

    def _placed_layer(
        self,
        layer: int,
        current: Callable[[], tuple[HostPass, Tensor | None]],
        use: Callable[[PlacedCall], Tensor | None] | None,
    ) -> list[Hook]:
        seen: dict[str, Tensor] = {}
        rule = self.score_rule(layer)
        by_slot = rule.window is not None or rule.alibi_slopes is not None

        def keep(key: str) -> Callable[[Tensor], None]:
            def store(tensor: Tensor) -> None:
                seen[key] = tensor

            return store

        def positions() -> Tensor:
            host_pass, moved = current()
            return (host_pass.index if moved is None else moved)[:, host_pass.n_past :]

        def at_z(z: Tensor) -> Tensor | None:
            host_pass, moved = current()
            q, k, v = seen.pop("q"), seen.pop("k"), seen.pop("v")
            past_k, _ = host_pass.past(layer)
            k = k if past_k is None else torch.cat([past_k.to(k), k], dim=1)
            v = host_pass.all_values(layer, v)
            where = (host_pass.index if moved is None else moved).to(z.device)
            call = PlacedCall(
                layer,
                q=q,
                k=k,
                v=v,
                z=z,
                rule=rule,
                dst_positions=where[:, host_pass.n_past :],
                src_positions=where[:, -k.shape[1] :],
                valid=host_pass.valid.to(z.device)[:, -k.shape[1] :],
            )
            corrected = call.attend(call.scores()) if by_slot and moved is not None else None
            if corrected is not None:
                call = replace(call, z=corrected)
            edited = None if use is None else use(call)
            return corrected if edited is None else edited

        hooks = self.query_key_hooks(layer, keep("q"), keep("k"), offset=0, positions=positions)
        return [*hooks, (self.hook_name("v", layer), keep("v")), (self.hook_name("z", layer), at_z)]

    @contextmanager
    def hooked(self, hooks: Sequence[Hook]) -> Iterator[None]:
        """Attach hooks for the length of the block, names checked first."""
        begins = [function for name, function in hooks if name == PASS]
        others = [hook for hook in hooks if hook[0] != PASS]
        check_hook_names(self.hook_points, [name for name, _ in others], owner=self.info.name)

        def begin(host_pass: HostPass) -> Tensor | None:
            placed = [function(host_pass) for function in begins]
            return next((positions for positions in placed if positions is not None), None)

        with ExitStack() as stack:
            if begins:
                stack.enter_context(self._watching(begin))
            stack.enter_context(attached(self.hook_points, others))
            yield

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        hooks: Sequence[Hook] = (),
        prefix: Prefix | None = None,
        stop_after_attention: bool = False,
        grad: bool = False,
    ) -> Tensor | None:
        """One forward pass in eval mode.

        Args:
            tokens: token ids; batches of unequal length are padded on the right (causal: padding is never seen).
            hooks: what to attach for this pass.
            prefix: run `tokens` behind this shared prefix.
            stop_after_attention: end the pass at the last layer's z and return None: no last MLP, no unembedding.
            grad: keep the graph.

        Returns:
            Logits ``[batch, pos, d_vocab]``, or None.
        """
        stop: list[Hook] = []
        if stop_after_attention:

            def halt(_: Tensor) -> None:
                raise StopForward

            stop = [(self.hook_name("z", self.info.n_layers - 1), halt)]
        with inference_state(self.roots, grad=grad), self.hooked([*hooks, *stop]):
            try:
                return self._forward(tokens.to(self.device), prefix)
            except StopForward:
                return None

    def run_prefix(self, tokens: Int[Tensor, " pos"], *, hooks: Sequence[Hook] = (), grad: bool = False) -> Prefix:
        """Run tokens once and keep every layer's keys and values (docs/theory.md, section 5)."""
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}

        def ignore(_: Tensor) -> None:
            pass

        def keep(store: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
            def use(tensor: Tensor) -> None:
                store[layer] = tensor[0]
                if layer == self.info.n_layers - 1 and layer in keys and layer in values:
                    raise StopForward  # the last layer's attention is read by nobody

            return use

        own: list[Hook] = []
        for layer in range(self.info.n_layers):
            own += self.query_key_hooks(layer, ignore, keep(keys, layer), offset=0)
            own.append((self.hook_name("v", layer), keep(values, layer)))
        with inference_state(self.roots, grad=grad), self.hooked([*hooks, *own]):
            read_cache = self._forward_prefix(tokens[None].to(self.device))
        order = range(self.info.n_layers)
        k = tuple(keys[layer] for layer in order)
        v = tuple(values[layer] for layer in order)
        return Prefix(k=k, v=v, host_k=read_cache() or k)

    def __repr__(self) -> str:
        i = self.info
        weights = f"weights with {' and '.join(i.processing)}" if i.processing else "raw weights"
        grouped = f", {i.n_kv_heads} key-value heads" if i.n_kv_heads != i.n_heads else ""
        return (
            f"AttentionModel({i.name!r}: {i.host}, {i.architecture}, {i.n_layers} layers x {i.n_heads} heads"
            f"{grouped}, d_head {i.d_head}, {i.positions} positions, {i.dtype}, {weights})"
        )


def _rebuilt_pattern(rule: ScoreRule, q: Tensor, k: Tensor, offset: int) -> Tensor:
    dst = torch.arange(offset, offset + q.shape[1], device=q.device)
    src = torch.arange(k.shape[1], device=k.device)
    scores = attention_scores(rule, q, k, dst_positions=dst, src_positions=src)
    return softmax_with_sink(scores, rule.sinks)[0]


def dtype_name(dtype: Any) -> str:
    """`"float32"` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def refuse_blocks(name: str, reasons: Mapping[str, bool]) -> None:
    """Raise `UnsupportedModelError` with the first reason why a block's MLP does not simply follow its attention."""
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(
                f"the implicit weight update of {name} is not defined: {reason}. It needs pre-norm blocks whose "
                "plain or gated MLP follows attention."
            )
