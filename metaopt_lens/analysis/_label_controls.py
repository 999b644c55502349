"""Runs behind demonstrations with shuffled or flipped labels: the prompts, and what is answered there (null d)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._comparison import FLIPPED_LABELS, SHUFFLED_LABELS
from metaopt_lens.analysis._controls import finetune_arguments, flip_labels, shuffle_labels
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt
from metaopt_lens.runs import Scoring, run_shared_prefix, score_candidates


def moved_labels(
    prompts: Sequence[ICLPrompt], *, shuffled: bool, flipped: bool, seeds: Sequence[int]
) -> dict[str, list[list[ICLPrompt]]]:
    """The prompts of one set under each control, one list a draw; nothing where all demonstrations have one label.

    Args:
        prompts: with the same demonstrations.
        shuffled: one draw for each seed.
        flipped: one draw.
        seeds: of the draws.
    """
    if len({demo.label for demo in prompts[0].demos}) < 2:
        return {}
    found = {}
    if shuffled:
        found[SHUFFLED_LABELS] = [[shuffle_labels(p, seed=seed) for p in prompts] for seed in seeds]
    if flipped:
        found[FLIPPED_LABELS] = [[flip_labels(p, seed=seeds[0]) for p in prompts]]
    return found


def control_answers(
    model: LensModel,
    prompt: ICLPrompt,
    tokenized: Sequence[TokenizedPrompt],
    update: WeightUpdate,
    labels: Sequence[Sequence[int]],
    allowed: Bool[Tensor, "query candidate"],
    *,
    scoring: Scoring,
    prepend_bos: bool | None,
    batch_size: int | None,
) -> dict[str, Int[Tensor, " query"]]:
    """Predicted candidates behind a control's demonstrations: in context (``ICL``) and finetuned on them (``FT``).

    Args:
        model: never modified.
        prompt: the first of the control's prompts.
        tokenized: all of them.
        update: what says how to finetune; ``FT`` is left out where it does not.
        labels: token ids of the candidates.
        allowed: which of them each query chooses among.
        scoring: of candidates.
        prepend_bos: as for the prompts.
        batch_size: queries run together.
    """
    first = tokenized[0]
    queries = [t.ids[t.query.start :] for t in tokenized]

    def best(prefix: Any) -> Tensor:
        scores = score_candidates(model, prefix, queries, labels, scoring=scoring, batch_size=batch_size)
        return scores.masked_fill(~allowed, -torch.inf).argmax(-1)

    found = {"ICL": best(run_shared_prefix(model, first.ids[: first.query.start]))}
    again = _finetuned_like(model, prompt, update, prepend_bos=prepend_bos)
    if again is not None:
        with again.applied(model):
            found["FT"] = best(run_shared_prefix(model, first.ids[: first.demonstrations.start]))
    return found


def _finetuned_like(
    model: LensModel, prompt: ICLPrompt, update: WeightUpdate, *, prepend_bos: bool | None
) -> WeightUpdate | None:
    """None where the update does not say how it was made."""
    try:
        arguments = finetune_arguments(update)
    except OptionError:
        return None
    return finetune(model, prompt, prepend_bos=prepend_bos, progress=False, allow_processed=True, **arguments)
