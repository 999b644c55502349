"""One prompt in one setting, and one prompt's settings: the values that everything else reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.dual import ScoreRule, visible_sources
from metaopt_lens.models import ModelInfo, Prefix
from metaopt_lens.prompts import TokenizedPrompt

Setting = Literal["icl", "zs", "zs_matched", "ft", "ft_matched"]
# Which of them have the demonstrations in front, which hide these from the query, which belong to the changed model.
SETTINGS: tuple[Setting, ...] = ("icl", "zs", "zs_matched", "ft", "ft_matched")
WITH_DEMOS = frozenset({"icl", "zs_matched", "ft_matched"})
MATCHED = frozenset({"zs_matched", "ft_matched"})
CHANGED = frozenset({"ft", "ft_matched"})


@dataclass(frozen=True, eq=False)
class Stream:
    """What stands in the residual stream at the destinations, but for what the heads write.

    Attributes:
        start: before the first block.
        end: after the last.
        mlp: what every MLP (or mixture of experts) adds, after a norm that follows it; 0 in a layer without one.
    """

    start: Float[Tensor, "dst d_model"]
    end: Float[Tensor, "dst d_model"]
    mlp: Float[Tensor, "dst layer d_model"]


@dataclass(frozen=True, eq=False)
class Run:
    """One prompt in one setting, at the destinations asked for. The destination axis is always there.

    Sources are all tokens of the setting's prompt: those before the query (`prefix`, shared with other queries, never
    copied), then the query's own. A position-matched run has the tokens and positions of the in-context prompt; its
    query sees nothing of D (docs/theory.md, section 2), and `pattern` is 0 there. In every setting
    ``z = sum_i pattern_i v_i``, plus the moving average of values under momentum attention.

    Attributes:
        setting: ``"icl"`` in context, ``"zs"`` zero-shot, ``"zs_matched"`` zero-shot at in-context positions; ``"ft"``
            and ``"ft_matched"`` are these two on the changed (finetuned) model.
        model: names and sizes of the model.
        tokens: the prompt of this setting: ids and spans of S, D and Q.
        destinations: positions in that prompt.
        q: queries as the scores see them (rotated, normed).
        z: head outputs before W_O.
        pattern: attention probabilities.
        sink: probability of the attention sink (0 without sinks).
        prefix: keys and values of S and D; None where nothing stands before the query.
        own_k, own_v: keys (as the scores see them) and values of the query's tokens.
        rules: how each layer scores.
        eta: of every head, under momentum attention.
        residual: residual stream before every block and after the last, if kept.
        attention_input: what the projections read, if kept.
        raw_q: queries before rotary and QK-norm, if kept.
        own_stream: residual stream before every block at the query's tokens, if kept.
        stream: the residual stream's ends and what the MLPs write, if kept.
        asked: token ids whose logits were kept.
        logits: theirs, in float32 at least.
        log_normaliser: logsumexp of all logits, so that ``logits - log_normaliser`` are log-probabilities.
        ranks: of the tokens asked for among the whole vocabulary, 1 for the most probable.
        top_tokens, top_logits: the most probable next tokens, if kept, the first one first.
    """

    setting: Setting
    model: ModelInfo
    tokens: TokenizedPrompt
    destinations: tuple[int, ...]
    q: Float[Tensor, "dst layer head d_head"]
    z: Float[Tensor, "dst layer head d_head"]
    pattern: Float[Tensor, "dst layer head src"]
    sink: Float[Tensor, "dst layer head"]
    prefix: Prefix | None
    own_k: Float[Tensor, "layer pos kv_head d_head"]
    own_v: Float[Tensor, "layer pos kv_head d_head"]
    rules: tuple[ScoreRule, ...]
    eta: Float[Tensor, "layer head"] | None = None
    residual: Float[Tensor, "dst layer_and_end d_model"] | None = None
    attention_input: Float[Tensor, "dst layer d_model"] | None = None
    raw_q: Float[Tensor, "dst layer head d_head"] | None = None
    own_stream: Float[Tensor, "layer pos d_model"] | None = None
    stream: Stream | None = None
    asked: tuple[int, ...] = ()
    logits: Float[Tensor, "dst asked"] | None = None
    log_normaliser: Float[Tensor, " dst"] | None = None
    ranks: Int[Tensor, "dst asked"] | None = None
    top_tokens: Int[Tensor, "dst top"] | None = None
    top_logits: Float[Tensor, "dst top"] | None = None

    def k_of(self, layer: int) -> Float[Tensor, "src kv_head d_head"]:
        """Keys of all tokens in a layer, as the scores see them.

        Args:
            layer: counted from 0.
        """
        own = self.own_k[layer]
        return own if self.prefix is None else torch.cat([self.prefix.k[layer].to(own.device), own])

    def v_of(self, layer: int) -> Float[Tensor, "src kv_head d_head"]:
        """Values of all tokens in a layer.

        Args:
            layer: counted from 0.
        """
        own = self.own_v[layer]
        return own if self.prefix is None else torch.cat([self.prefix.v[layer].to(own.device), own])

    @property
    def k(self) -> Float[Tensor, "layer src kv_head d_head"]:
        """Keys of all tokens (a copy; `k_of` gives one layer's)."""
        return torch.stack([self.k_of(layer) for layer in range(len(self.own_k))])

    @property
    def v(self) -> Float[Tensor, "layer src kv_head d_head"]:
        """Values of all tokens (a copy; `v_of` gives one layer's)."""
        return torch.stack([self.v_of(layer) for layer in range(len(self.own_v))])

    @property
    def in_demos(self) -> Bool[Tensor, " src"]:
        """Which sources belong to D."""
        inside = torch.zeros(self.tokens.n_tokens, dtype=torch.bool, device=self.z.device)
        inside[self.tokens.demonstrations.slice] = True
        return inside

    @property
    def visible(self) -> Bool[Tensor, "layer dst src"]:
        """Which sources each destination sees: causal, inside the layer's sliding window, not hidden."""
        dst = torch.tensor(self.destinations, device=self.z.device)
        src = torch.arange(self.tokens.n_tokens, device=self.z.device)
        seen = torch.stack([visible_sources(rule, dst, src) for rule in self.rules])
        return seen & ~self.in_demos if self.setting in MATCHED else seen


@dataclass(frozen=True, eq=False)
class Runs:
    """One prompt's runs by setting: ``runs["icl"]`` or ``runs.icl``; ``"ft" in runs`` says whether it was made."""

    by_setting: Mapping[Setting, Run]

    def __getitem__(self, setting: Setting) -> Run:
        if setting not in self.by_setting:
            raise OptionError(
                f"the run {setting!r} was not made, only {', '.join(map(repr, self.by_setting))}: "
                f"record the prompt with settings=(..., {setting!r})."
            )
        return self.by_setting[setting]

    def __contains__(self, setting: object) -> bool:
        return setting in self.by_setting

    def __iter__(self) -> Iterator[Setting]:
        return iter(self.by_setting)

    def items(self) -> Iterable[tuple[Setting, Run]]:
        """Settings and runs, in the order they were asked for."""
        return self.by_setting.items()

    def values(self) -> Iterable[Run]:
        """The runs, in the order they were asked for."""
        return self.by_setting.values()

    @property
    def icl(self) -> Run:
        """In context."""
        return self["icl"]

    @property
    def zs(self) -> Run:
        """Zero-shot: S and Q alone."""
        return self["zs"]

    @property
    def zs_matched(self) -> Run:
        """Zero-shot with every token of Q at its in-context position."""
        return self["zs_matched"]

    @property
    def ft(self) -> Run:
        """Zero-shot on the changed model."""
        return self["ft"]

    @property
    def ft_matched(self) -> Run:
        """Position-matched zero-shot on the changed model."""
        return self["ft_matched"]
