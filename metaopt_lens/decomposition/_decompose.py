"""decompose(): run a model on a prompt and split every head's output (docs/theory.md, section 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from metaopt_lens._errors import OptionError, SpanError
from metaopt_lens._storage import provenance
from metaopt_lens.decomposition._result import Decomposition, DecompositionSet
from metaopt_lens.decomposition._runs import ZeroShotRuns, run_settings
from metaopt_lens.extraction import QueryCapture, refuse_acting, run_shared_prefix, tokenize_for
from metaopt_lens.models import AttentionModel, MomentumTerm, Prefix, active_momentum, announced_momentum, wrap
from metaopt_lens.prompts import ICLPrompt, PromptLike, TokenizedPrompt, as_prompts, is_single

Position = int | Literal["last", "all"]


@overload
def decompose(
    model: Any,
    prompt: PromptLike,
    *,
    position: Position = "last",
    zero_shot_runs: ZeroShotRuns = "both",
    prepend_bos: bool | None = None,
    momentum: MomentumTerm | None = None,
    grad: bool = False,
    batch_size: int = 8,
) -> Decomposition: ...


@overload
def decompose(
    model: Any,
    prompt: Sequence[PromptLike],
    *,
    position: Position = "last",
    zero_shot_runs: ZeroShotRuns = "both",
    prepend_bos: bool | None = None,
    momentum: MomentumTerm | None = None,
    grad: bool = False,
    batch_size: int = 8,
) -> DecompositionSet: ...


def decompose(
    model: Any,
    prompt: Any,
    *,
    position: Position = "last",
    zero_shot_runs: ZeroShotRuns = "both",
    prepend_bos: bool | None = None,
    momentum: MomentumTerm | None = None,
    grad: bool = False,
    batch_size: int = 8,
) -> Decomposition | DecompositionSet:
    """Split every attention head's output into its zero-shot part and its in-context meta-gradient part.

    The demonstrations are run once and shared by all queries behind them. Exact softmax form, relaxed linear form
    (arXiv:2212.10559, eq. 7-10) and the effects against real zero-shot runs: see docs/theory.md, section 2.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompt: an `ICLPrompt`, text read by `ICLPrompt.from_string`, or a dict with the keys of the JSON prompt files
            (see `load_prompts`); a list of them (or a dict with "queries") gives a `DecompositionSet`.
            Prompts with the same demonstrations share their pass.
        position: which token of the query to read: ``"last"`` (the one that predicts the label), ``"all"``, or an
            index into the whole prompt (negative counts from its end).
        zero_shot_runs: ``"both"`` also runs the prompt without demonstrations, plainly and position-matched;
            ``"plain"`` only plainly (then indirect and position effect are one number); ``"none"`` neither.
        prepend_bos: put BOS first; None for the model's default (`TokenizedPrompt.bos_note` says which).
        momentum: run with this `MomentumAttention` too. Its part of z is then a third one, and split over the
            demonstrations: `Decomposition.momentum` and `momentum_meta_gradient`. Momentum attention that is on already
            (``with intervene(model, ...)``) is seen by itself.
        grad: keep the graph, so that gradients flow from every part to the model's weights.
        batch_size: queries run together.

    Returns:
        A `Decomposition`, or a `DecompositionSet` in the order of the prompts.

    Raises:
        PromptError: no demonstrations, an empty piece, no tokenizer, a word the tokenizer does not know.
        ContextWindowError: the prompt is longer than the context window.
        SpanError: `position` is not in the query.
        OptionError: a meta-gradient or a knock-out is applied to the model.
        UnsupportedModelError: the architecture cannot be split, or a hook changes z, so that its parts do not add up
            to it (hooks on queries, keys and values, and weight updates, are fine).
        NonFiniteError: NaN or infinity in the activations; names the first layer.
    """
    if zero_shot_runs not in {"both", "plain", "none"}:
        raise OptionError(f"zero_shot_runs must be 'both', 'plain' or 'none', got {zero_shot_runs!r}.")
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}.")
    wrapped = wrap(model)
    refuse_acting(wrapped, "decompose")
    parsed = as_prompts(prompt)
    tokenized = [tokenize_for(wrapped, p, prepend_bos=prepend_bos, require_demos=True) for p in parsed]
    rows = [_destinations(t, position) for t in tokenized]
    results: list[Decomposition | None] = [None] * len(parsed)
    with _momentum_on(wrapped, momentum):
        for group in prompt_groups(tokenized):
            shared = run_shared_prefix(wrapped, tokenized[group[0]].ids[: tokenized[group[0]].query.start], grad=grad)
            assert shared is not None  # require_demos
            stacked = _stacked(shared.k), _stacked(shared.v)  # one copy for all queries behind these demonstrations
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                for index, result in zip(
                    batch,
                    _decompose_batch(
                        wrapped,
                        [parsed[i] for i in batch],
                        [tokenized[i] for i in batch],
                        [rows[i] for i in batch],
                        shared,
                        stacked,
                        zero_shot_runs=zero_shot_runs,
                        keep_position_axis=position == "all",
                        grad=grad,
                    ),
                    strict=True,
                ):
                    results[index] = result
    finished = tuple(result for result in results if result is not None)
    return finished[0] if is_single(prompt) else DecompositionSet(finished)


@contextmanager
def _momentum_on(model: AttentionModel, momentum: MomentumTerm | None) -> Iterator[None]:
    if momentum is None:
        yield
        return
    eta = momentum.etas(model)
    with model.hooked(momentum.hooks(model)), announced_momentum(model, eta):
        active_momentum(model)  # refuses a head that has momentum already
        yield


def _decompose_batch(
    model: AttentionModel,
    prompts: list[ICLPrompt],
    tokenized: list[TokenizedPrompt],
    destinations: list[tuple[int, ...]],
    shared: Prefix,
    stacked: tuple[Tensor, Tensor],
    *,
    zero_shot_runs: ZeroShotRuns,
    keep_position_axis: bool,
    grad: bool,
) -> list[Decomposition]:
    runs = run_settings(model, shared, tokenized, destinations, zero_shot_runs=zero_shot_runs, grad=grad)
    eta = active_momentum(model)
    info = provenance() | {"zero_shot_runs": zero_shot_runs}
    prefix_k, prefix_v = stacked
    window = torch.tensor([model.score_rule(layer).window or model.info.n_ctx for layer in range(model.info.n_layers)])
    return [
        Decomposition(
            model=model.info,
            prompt=prompts[i],
            tokenized=tokenized[i],
            positions=destinations[i],
            keep_position_axis=keep_position_axis,
            q=runs.in_context[i].q,
            pattern=runs.in_context[i].pattern,
            sink=runs.in_context[i].sink,
            z=runs.in_context[i].z,
            prefix_k=prefix_k,
            prefix_v=prefix_v,
            query_k=runs.in_context[i].k,
            query_v=runs.in_context[i].v,
            window=window,
            z_zero_shot=_z(runs.zero_shot, i),
            z_position_matched=_z(runs.position_matched, i),
            provenance=info,
            eta=eta if eta is None or grad else eta.detach(),
            source=model,
        )
        for i in range(len(tokenized))
    ]


def _stacked(layers: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([t.to(layers[0].device) for t in layers])  # layers may live on several devices


def _z(captures: tuple[QueryCapture, ...] | None, index: int) -> Tensor | None:
    return None if captures is None else captures[index].z


def prompt_groups(tokenized: list[TokenizedPrompt]) -> list[list[int]]:
    """Indices of prompts with the same tokens up to the query, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, prompt in enumerate(tokenized):
        key = (prompt.ids[: prompt.query.start], prompt.demonstrations)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _destinations(prompt: TokenizedPrompt, position: Position) -> tuple[int, ...]:
    if position == "last":
        return (prompt.n_tokens - 1,)
    if position == "all":
        return tuple(range(prompt.query.start, prompt.query.stop))
    if not isinstance(position, int):
        raise OptionError(f"position must be 'last', 'all' or a token index, got {position!r}.")
    index = position + prompt.n_tokens if position < 0 else position
    if index not in prompt.query:
        raise SpanError(
            f"position {position} is not in the query, which holds positions {prompt.query.start} to "
            f"{prompt.query.stop - 1} of this prompt."
        )
    return (index,)
