"""Attention to the demonstrations' tokens: in context, and at finetuning time.

The finetuning counterpart of in-context attention is the product of the query vector in the finetuned model's
zero-shot run with the query vectors of the demonstration tokens as the finetuning pass saw them (Dai et al.
2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._checks import check_finite, check_same_shape
from metaopt_lens.analysis._convention import Convention


@dataclass(frozen=True)
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
    """Product of each query's vector with each demonstration token's, summed over all heads, in float64."""
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
    demonstration tokens; `demo_lengths` counts the tokens without start token and separator."""
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
