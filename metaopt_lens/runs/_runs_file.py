"""Runs as tensors and JSON, for saved results: the prefix once, every setting's own tensors, how layers score."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import ScoreRule
from metaopt_lens.models import ModelInfo, Prefix
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._prompt_run import CHANGED, WITH_DEMOS, Run, Runs

_TENSORS = ("q", "z", "pattern", "sink", "own_k", "own_v")
_OPTIONAL = ("residual", "attention_input", "raw_q", "logits", "log_normaliser")


def runs_to_file(runs: Runs) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and everything else as JSON-able values.

    Args:
        runs: one prompt's runs.
    """
    first = max(runs.values(), key=lambda run: run.tokens.n_tokens)  # with D, where a setting has it
    tensors: dict[str, Tensor] = {}
    for setting, run in runs.items():
        named = {name: getattr(run, name) for name in (*_TENSORS, *_OPTIONAL)}
        tensors |= {f"{setting}.{name}": t for name, t in named.items() if t is not None}
        tensors |= _prefix_tensors(run, already=tensors)
    for layer, rule in enumerate(first.rules):
        found = {"alibi_slopes": rule.alibi_slopes, "sinks": rule.sinks}
        tensors |= {f"rules.{layer}.{name}": t for name, t in found.items() if t is not None}
    if first.eta is not None:
        tensors["eta"] = first.eta
    meta = {
        "model": dataclasses.asdict(first.model),
        "tokens": dataclasses.asdict(first.tokens),
        "destinations": {setting: list(run.destinations) for setting, run in runs.items()},
        "asked": list(first.asked),
        "rules": [{"scale": r.scale, "softcap": r.softcap, "window": r.window} for r in first.rules],
    }
    return tensors, meta


def runs_from_file(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Runs:
    """Inverse of `runs_to_file`; raises KeyError or TypeError on anything else."""
    info = ModelInfo(**(meta["model"] | {"processing": tuple(meta["model"]["processing"])}))
    tokens = _tokens(meta["tokens"])
    rules = tuple(
        ScoreRule(**rule, alibi_slopes=tensors.get(f"rules.{i}.alibi_slopes"), sinks=tensors.get(f"rules.{i}.sinks"))
        for i, rule in enumerate(meta["rules"])
    )
    found = {}
    for setting, destinations in meta["destinations"].items():
        own = tokens if setting in WITH_DEMOS else tokens.zero_shot()
        found[setting] = Run(
            setting=setting,
            model=info,
            tokens=own,
            destinations=tuple(destinations),
            prefix=_prefix(tensors, _family(setting), own.query.start),
            rules=rules,
            eta=tensors.get("eta"),
            asked=tuple(meta["asked"]),
            **{name: tensors[f"{setting}.{name}"] for name in _TENSORS},
            **{name: tensors.get(f"{setting}.{name}") for name in _OPTIONAL},  # type: ignore[arg-type]
        )
    return Runs(found)


def _family(setting: str) -> str:
    return "changed" if setting in CHANGED else "base"


def _prefix_tensors(run: Run, already: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prefix of the base or the changed model, unless a longer one is there."""
    if run.prefix is None:
        return {}
    name = f"{_family(run.setting)}.prefix_"
    before = already.get(name + "k")
    if before is not None and before.shape[1] >= run.prefix.n_tokens:
        return {}
    k, v, host_k = run.prefix.k, run.prefix.v, run.prefix.host_k
    found = {"k": k, "v": v} if host_k is k else {"k": k, "v": v, "host_k": host_k}
    return {name + key: torch.stack([t.to(layers[0].device) for t in layers]) for key, layers in found.items()}


def _prefix(tensors: dict[str, Tensor], family: str, n_tokens: int) -> Prefix | None:
    name = f"{family}.prefix_"
    if not n_tokens:
        return None
    k, v = tuple(tensors[name + "k"]), tuple(tensors[name + "v"])
    host_k = tuple(tensors[name + "host_k"]) if name + "host_k" in tensors else k
    return Prefix(k=k, v=v, host_k=host_k).truncate(n_tokens)


def _tokens(meta: dict[str, Any]) -> TokenizedPrompt:
    fields = dict(meta)
    for name in ("bos", "instruction", "query"):
        fields[name] = None if fields[name] is None else TokenSpan(**fields[name])
    for name in ("demos", "demo_inputs", "labels"):
        fields[name] = tuple(TokenSpan(**span) for span in fields[name])
    for name in ("ids", "tokens"):
        fields[name] = tuple(fields[name])
    return TokenizedPrompt(**fields)
