"""Attention to the demonstrations' tokens: in context, and at finetuning time.

The finetuning counterpart of in-context attention is the product of the query vector in the finetuned model's
zero-shot run with the query vectors of the demonstration tokens as the finetuning pass saw them (Dai et al.
2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._checks import check_finite, check_same_shape
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.finetuning import StepFactors, WeightUpdate
from metaopt_lens.models import LensModel


@dataclass(frozen=True, eq=False)
class TrainingAttention:
    """Two maps over the demonstrations, each per token and per demonstration.

    Attributes:
        icl_token, ft_token: over the demonstration tokens.
        icl_example, ft_example: over the demonstrations (summed weight of their tokens).
        logarithmic: whether the numbers are logarithms of the softmax weights. Same order, but
            no weight underflows to 0 and makes ties that are not in the data.
    """

    icl_token: Float[Tensor, "query layer src"]
    ft_token: Float[Tensor, "query layer src"]
    icl_example: Float[Tensor, "query layer demo"]
    ft_example: Float[Tensor, "query layer demo"]
    logarithmic: bool


def finetuning_scores(
    ft_attn_q: Float[Tensor, "src layer d_model"], attn_q: Float[Tensor, "query layer d_model"]
) -> Float[Tensor, "query layer src"]:
    """Product of each query's vector with each demonstration token's, summed over all heads, in float64.

    Args:
        ft_attn_q: query vectors of the demonstrations' tokens in finetuning.
        attn_q: query vectors of the queries.
    """
    if ft_attn_q.shape[1:] != attn_q.shape[1:]:
        raise OptionError(
            f"query vectors of one model are needed, got layers and width {tuple(ft_attn_q.shape[1:])} "
            f"from finetuning and {tuple(attn_q.shape[1:])} from the queries."
        )
    queries = attn_q.double()
    scores = queries.new_empty(len(queries), queries.shape[1], len(ft_attn_q))
    # one layer at a time is held in float64, always in the same place: fresh copies fragment the heap
    tokens = queries.new_empty(len(ft_attn_q), queries.shape[2])
    for layer in range(queries.shape[1]):
        tokens.copy_(ft_attn_q[:, layer])
        scores[:, layer] = queries[:, layer] @ tokens.mT
    return scores


def context_columns(demo_lengths: Int[Tensor, " demo"]) -> Int[Tensor, " src"]:
    """Columns of a context ``start token, demonstration, separator, demonstration, separator ...`` that are
    demonstration tokens; `demo_lengths` counts the tokens without start token and separator.

    Args:
        demo_lengths: tokens of each demonstration.
    """
    lengths = demo_lengths.tolist()
    columns: list[int] = []
    start = 1
    for length in lengths:
        columns.extend(range(start, start + length))
        start += length + 1
    return torch.tensor(columns, dtype=torch.int64)


def training_attention(
    icl_scores: Float[Tensor, "query layer src"],
    ft_scores: Float[Tensor, "query layer src"],
    demo_lengths: Int[Tensor, " demo"],
    *,
    convention: Convention = Convention.DEFAULT,
) -> TrainingAttention:
    """Turn scores into maps by one softmax over all demonstration tokens together.

    Args:
        icl_scores: scores to the demonstrations' tokens in context, summed over heads.
        ft_scores: the counterpart in finetuning (see `finetuning_scores`).
        demo_lengths: tokens of each demonstration, without start token and separator.
        convention: its `ranks_logarithms` is used: whether the maps hold the weights, or their logarithms.

    Raises:
        OptionError: lengths that do not add up to the tokens.
    """
    check_same_shape(icl_scores=icl_scores, ft_scores=ft_scores)
    check_finite(icl_scores=icl_scores, ft_scores=ft_scores)
    n_tokens = int(demo_lengths.sum())
    if n_tokens != icl_scores.shape[-1] or bool((demo_lengths < 1).any()):
        raise OptionError(
            f"demo_lengths must be positive and add up to the {icl_scores.shape[-1]} tokens of the scores, "
            f"got {demo_lengths.tolist()} (sum {n_tokens}): leave out start tokens and separators."
        )
    logarithmic = convention.ranks_logarithms
    weigh, add = (torch.log_softmax, torch.logsumexp) if logarithmic else (torch.softmax, torch.sum)
    icl, ft = (weigh(scores.double(), -1) for scores in (icl_scores, ft_scores))
    sizes = demo_lengths.tolist()
    icl_ex, ft_ex = (torch.stack([add(part, -1) for part in torch.split(w, sizes, -1)], -1) for w in (icl, ft))
    return TrainingAttention(icl, ft, icl_ex, ft_ex, logarithmic=logarithmic)


def usable_factors(update: WeightUpdate) -> tuple[StepFactors, ...] | None:
    """Per-step factors of a finetuning whose steps are the demonstrations in the prompt's order; else None.

    Args:
        update: what finetuning did.
    """
    s = update.settings
    if update.factors is None or s is None or s.batch_size != 1 or s.epochs != 1 or s.order != "given":
        return None
    return update.factors


def demonstration_queries(model: LensModel, factors: Sequence[StepFactors]) -> list[Float[Tensor, "_ layer d_q"]]:
    """Query vectors of every demonstration's tokens (BOS first) in its own finetuning step, with the score scale, heads
    side by side.

    Args:
        model: that was finetuned.
        factors: of its steps.
    """
    scale = torch.tensor([model.score_rule(layer).scale for layer in range(model.info.n_layers)])
    return [
        (step.q[:, 0, : step.n_tokens[0]].flatten(2).transpose(0, 1).cpu() * scale[:, None]).to(step.q.dtype)
        for step in factors
    ]


def ranked_maps(
    context: Float[Tensor, "query layer src"],
    attn_q: Float[Tensor, "query layer d_q"],
    trained: Sequence[Float[Tensor, "_ layer d_q"]],
    *,
    convention: Convention = Convention.DEFAULT,
) -> TrainingAttention:
    """The maps of `training_attention`, with scores made equal that differ by rounding alone.

    Args:
        context: scores to the demonstrations' tokens in context, summed over heads.
        attn_q: query vectors of the finetuned run, times the score scale.
        trained: query vectors of each demonstration's tokens in finetuning, without BOS.
        convention: its `ignores_rounding` and `ranks_logarithms` are used.
    """
    scores = context.double(), finetuning_scores(torch.cat(list(trained)), attn_q)
    if convention.ignores_rounding:
        scores = _merge_ties(scores[0], context.dtype), _merge_ties(scores[1], attn_q.dtype)
    return training_attention(*scores, torch.tensor([len(t) for t in trained]), convention=convention)


def _merge_ties(scores: Float[Tensor, "query layer src"], dtype: torch.dtype) -> Float[Tensor, "query layer src"]:
    """Scores that differ by rounding alone made equal.

    The same word in several demonstrations has one query vector in the lowest layer: the order that rounding gives such
    ties is no ranking.
    """
    tolerance = 16 * torch.finfo(dtype).eps * scores.abs().amax(-1, keepdim=True)
    ordered, order = scores.sort(-1)
    place = torch.arange(scores.shape[-1]).expand_as(order)
    starts = torch.where(ordered.diff(dim=-1, prepend=ordered[..., :1] - 2 * tolerance - 1) > tolerance, place, 0)
    merged = ordered.gather(-1, starts.cummax(-1).values)
    return torch.empty_like(scores).scatter_(-1, order, merged)
