"""What knock-outs change of an answer's logit, at every token where it is read: for pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._types import HeadRef
from metaopt_lens.interventions._answer_metric import AnswerMetric
from metaopt_lens.interventions._demo_tokens import DemoTokens
from metaopt_lens.interventions._knock_out_runs import KnockOutRuns
from metaopt_lens.models import LensModel
from metaopt_lens.runs import refuse_acting, run_shared_prefix


@dataclass(frozen=True)
class LogitRead:
    """One reading of a logit.

    Attributes:
        row: the tokens behind the demonstrations, the last of which predicts the answer.
        token: the answer.
        rivals: whose mean logit is subtracted; none for the plain logit.
    """

    row: tuple[int, ...]
    token: int
    rivals: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LogitEffects:
    """Logits under knock-outs, after a soft-cap if there is one.

    Attributes:
        in_context: with nothing knocked out.
        first_order: estimated effect of every head's meta-gradient.
        heads: effect of each head asked for, by knock-out; for every reading in the order asked for.
        without: the logit with each selection of demonstrations hidden from the query, in all heads.
    """

    in_context: Float[Tensor, " read"]
    first_order: Float[Tensor, "read layer head"]
    heads: tuple[Float[Tensor, " _chosen"], ...]
    without: Float[Tensor, "read selection"]


def logit_effects(
    model: LensModel,
    demos: DemoTokens,
    reads: Sequence[LogitRead],
    *,
    heads: Sequence[Sequence[HeadRef]],
    without: Sequence[Sequence[int]],
) -> LogitEffects:
    """Knock-outs of single heads, and of selections of demonstrations in all heads, of several readings at once.

    Args:
        model: a wrapped model.
        demos: S and the demonstrations.
        reads: where logits are read.
        heads: for every reading the heads to knock out one by one, all their demonstrations hidden.
        without: selections of demonstrations (counted from 0) to hide.

    Raises:
        OptionError: an intervention is applied to the model.
    """
    refuse_acting(model, "logit_effects")
    tokens = sorted({token for read in reads for token in (read.token, *read.rivals)})
    at = {token: index for index, token in enumerate(tokens)}

    def value(logits: Tensor, number: int) -> Tensor:
        own, rivals = logits[-1, at[reads[number].token]], [at[token] for token in reads[number].rivals]
        return own - logits[-1, rivals].mean() if rivals else own

    rows = tuple(read.row for read in reads)
    last = tuple(torch.tensor([len(row) - 1]) for row in rows)
    prefix = run_shared_prefix(model, demos.ids)
    assert prefix is not None  # there is at least one demonstration
    runs = KnockOutRuns(model, demos, prefix, AnswerMetric("logit", rows, last, torch.tensor(tokens), value))
    n_demos, shape = len(demos.spans), (model.info.n_layers, model.info.n_heads)
    in_context, estimates = runs.first_order(torch.ones(1, n_demos, dtype=torch.bool))
    hidden = torch.zeros(len(without), n_demos, dtype=torch.bool)
    for number, selection in enumerate(without):
        hidden[number, list(selection)] = True
    return LogitEffects(
        in_context=in_context,
        first_order=estimates[0],
        heads=tuple(
            in_context[number] - runs.exact(*_one_by_one(chosen, shape, n_demos), [number])[:, 0]
            for number, chosen in enumerate(heads)
        ),
        without=runs.exact(torch.ones(len(without), *shape, dtype=torch.bool), hidden).mT,
    )


def _one_by_one(
    heads: Sequence[HeadRef], shape: tuple[int, int], n_demos: int
) -> tuple[Bool[Tensor, "variant layer head"], Bool[Tensor, "variant demo"]]:
    """Each head alone, all demonstrations hidden from it."""
    one = torch.zeros(len(heads), *shape, dtype=torch.bool)
    for number, ref in enumerate(heads):
        one[number, ref.layer, ref.head] = True
    return one, torch.ones(len(heads), n_demos, dtype=torch.bool)
