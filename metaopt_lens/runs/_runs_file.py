"""Runs as they are stored: what all settings share once, every setting's own tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.dual import ScoreRule
from metaopt_lens.models import ModelInfo, Prefix
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._prompt_run import CHANGED, WITH_DEMOS, Run, Runs, Setting, Stream


@dataclass(frozen=True, eq=False)
class OwnTensors:
    """The tensors of one setting's `Run`, but for those shared with other settings; the fields are as there."""

    q: Float[Tensor, "dst layer head d_head"]
    z: Float[Tensor, "dst layer head d_head"]
    pattern: Float[Tensor, "dst layer head src"]
    sink: Float[Tensor, "dst layer head"]
    own_k: Float[Tensor, "layer pos kv_head d_head"]
    own_v: Float[Tensor, "layer pos kv_head d_head"]
    residual: Float[Tensor, "dst layer_and_end d_model"] | None
    attention_input: Float[Tensor, "dst layer d_model"] | None
    raw_q: Float[Tensor, "dst layer head d_head"] | None
    stream: Stream | None
    logits: Float[Tensor, "dst asked"] | None
    log_normaliser: Float[Tensor, " dst"] | None
    ranks: Int[Tensor, "dst asked"] | None
    top_tokens: Int[Tensor, "dst top"] | None
    top_logits: Float[Tensor, "dst top"] | None

    @classmethod
    def of(cls, run: Run) -> OwnTensors:
        """Those of a run."""
        return cls(**{name: getattr(run, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, eq=False)
class StackedPrefix:
    """A `Prefix` with its layers in one tensor; `host_k` is None where it is `k`."""

    k: Float[Tensor, "layer pos kv_head d_head"]
    v: Float[Tensor, "layer pos kv_head d_head"]
    host_k: Float[Tensor, "layer pos kv_head d_head"] | None

    @classmethod
    def of(cls, prefix: Prefix) -> StackedPrefix:
        """Stack a prefix's layers."""
        host_k = None if prefix.host_k is prefix.k else _stack(prefix.host_k)
        return cls(_stack(prefix.k), _stack(prefix.v), host_k)

    def first(self, n_tokens: int) -> Prefix | None:
        """The prefix of the first tokens; None for 0."""
        k = tuple(self.k)
        return Prefix(k, tuple(self.v), k if self.host_k is None else tuple(self.host_k)).truncate(n_tokens)


@dataclass(frozen=True, eq=False)
class StoredRuns:
    """One prompt's `Runs`: the tokens of the longest, the longest prefix of the base and of the changed model.

    Attributes:
        model, asked, rules, eta: of every run.
        tokens: of the runs with demonstrations, where there is one.
        destinations, own: of each run, by setting.
        prefixes: of the ``"base"`` and the ``"changed"`` model.
    """

    model: ModelInfo
    tokens: TokenizedPrompt
    destinations: dict[Setting, tuple[int, ...]]
    asked: tuple[int, ...]
    rules: tuple[ScoreRule, ...]
    eta: Float[Tensor, "layer head"] | None
    own: dict[Setting, OwnTensors]
    prefixes: dict[str, StackedPrefix]

    @classmethod
    def of(cls, runs: Runs) -> StoredRuns:
        """The stored form of one prompt's runs."""
        first = max(runs.values(), key=lambda run: run.tokens.n_tokens)  # with D, where a setting has it
        longest: dict[str, Prefix] = {}
        for setting, run in runs.items():
            before = longest.get(_family(setting))
            if run.prefix is not None and (before is None or before.n_tokens < run.prefix.n_tokens):
                longest[_family(setting)] = run.prefix
        return cls(
            model=first.model,
            tokens=first.tokens,
            destinations={setting: run.destinations for setting, run in runs.items()},
            asked=first.asked,
            rules=first.rules,
            eta=first.eta,
            own={setting: OwnTensors.of(run) for setting, run in runs.items()},
            prefixes={family: StackedPrefix.of(prefix) for family, prefix in longest.items()},
        )

    def restore(self) -> Runs:
        """The runs this was made of."""
        return Runs({setting: self._run(setting) for setting in self.own})

    def _run(self, setting: Setting) -> Run:
        tokens = self.tokens if setting in WITH_DEMOS else self.tokens.zero_shot()
        before = tokens.query.start
        return Run(
            setting=setting,
            model=self.model,
            tokens=tokens,
            destinations=self.destinations[setting],
            prefix=self.prefixes[_family(setting)].first(before) if before else None,
            rules=self.rules,
            eta=self.eta,
            asked=self.asked,
            **vars(self.own[setting]),
        )


def _family(setting: Setting) -> str:
    return "changed" if setting in CHANGED else "base"


def _stack(layers: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([layer.to(layers[0].device) for layer in layers])
