"""The runs a decomposition compares: in context, position-matched zero-shot, plain zero-shot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._types import TokenSpan
from metaopt_lens.dual import momentum_values, softmax_with_sink, weighted_values
from metaopt_lens.extraction import QueryCapture, capture_queries
from metaopt_lens.models import AttentionCall, AttentionModel, Prefix, active_momentum
from metaopt_lens.prompts import TokenizedPrompt

ZeroShotRuns = Literal["both", "plain", "none"]


@dataclass(frozen=True, eq=False)
class SettingRuns:
    """Captures of the same queries in the settings that were run, in the order of the queries."""

    in_context: tuple[QueryCapture, ...]
    position_matched: tuple[QueryCapture, ...] | None
    zero_shot: tuple[QueryCapture, ...] | None


def run_settings(
    model: AttentionModel,
    shared: Prefix,
    tokenized: Sequence[TokenizedPrompt],
    destinations: Sequence[Sequence[int]],
    *,
    zero_shot_runs: ZeroShotRuns,
    grad: bool = False,
) -> SettingRuns:
    """Run queries behind the same demonstrations, and without them.

    The position-matched run is the in-context run with D knocked out at every position of Q in every layer
    (docs/theory.md, section 5); it rides in the same batch, so weights are read once. Under momentum attention D's
    share of the moving average is knocked out too.

    Args:
        shared: keys and values of S and D, from `run_shared_prefix`.
        tokenized: prompts with the same S and D.
        destinations: positions to keep, as indices into each prompt.
    """
    demos = tokenized[0].demonstrations
    queries = [t.ids[t.query.start :] for t in tokenized]
    rows = [[p - t.query.start for p in d] for t, d in zip(tokenized, destinations, strict=True)]
    n = len(queries)
    matched = plain = None
    eta = active_momentum(model)
    if zero_shot_runs == "both":

        def knock_out(call: AttentionCall) -> Tensor:
            without = without_demos(call, demos, slice(n, None))
            if eta is not None:
                without = without + _momentum_without(call, eta[call.layer], demos, slice(n, None)).to(without.dtype)
            return torch.cat([call.z[:n], without])

        both = capture_queries(model, shared, [*queries, *queries], [*rows, *rows], edit=knock_out, grad=grad)
        in_context, matched = tuple(both[:n]), tuple(both[n:])
    else:
        in_context = tuple(capture_queries(model, shared, queries, rows, grad=grad))
    if zero_shot_runs != "none":
        plain = tuple(capture_queries(model, shared.truncate(demos.start), queries, rows, grad=grad))
    return SettingRuns(in_context=in_context, position_matched=matched, zero_shot=plain)


def without_demos(
    call: AttentionCall, demos: TokenSpan, batch: slice = slice(None)
) -> Float[Tensor, "rows dst head d_head"]:
    """z with the demonstrations masked out, q, k and v unchanged, for some rows of the batch.

    Taken from the scores rather than from the pattern: half-precision patterns flush small probabilities to 0.
    """
    kept = {name: getattr(call, name)[batch] for name in ("q", "k", "v", "pattern", "z")}
    scores = replace(call, **kept).scores()
    inside = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    inside[demos.slice] = True
    weights, _ = softmax_with_sink(scores.masked_fill(inside, -torch.inf), call.rule.sinks)
    return weighted_values(weights, kept["v"]).to(call.z.dtype)


def _momentum_without(
    call: AttentionCall, eta: Float[Tensor, " head"], demos: TokenSpan, batch: slice
) -> Float[Tensor, "rows dst head d_head"]:
    """The moving average over all tokens but the demonstrations, which still take their places."""
    v = call.v[batch].clone()
    v[:, demos.slice] = 0.0
    return momentum_values(v, eta)[:, call.offset :]
