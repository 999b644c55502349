"""Our own runs in the published implementation's record format, so that others' programs can check ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.analysis import Comparison, demonstration_queries, usable_factors
from metaopt_lens.dual import at_least_float32
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.prompts import ICLPrompt
from metaopt_lens.records._query_record import DemoRecord, QueryRecord, write_records
from metaopt_lens.runs import (
    Keep,
    Run,
    Wanted,
    attention_output,
    demo_scores,
    own_scores,
    prompt_groups,
    record_batches,
    scaled_queries,
    tokenize_all,
)


def write_run_records(
    directory: str | os.PathLike[str],
    model: Any,
    prompts: Sequence[ICLPrompt],
    update: WeightUpdate,
    comparison: Comparison,
    *,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
) -> Path:
    """Run one demonstration set in all settings and write ``zs/``, ``icl/``, ``ftzs/`` and ``ft/``.

    What is written: attention outputs after W_O and scores over the query's tokens, at the token that predicts the
    label; scores to the demonstrations summed over heads; query vectors of that token and of the demonstrations' tokens
    in finetuning (before rotary), times the score scale. Columns that every reader drops (start token and separators in
    the context, the start token of a demonstration without one) hold 0.

    Args:
        directory: folder to write to.
        model: a wrapped model, or a host that `wrap` accepts.
        prompts: queries behind one set of demonstrations.
        update: finetuning on the same demonstrations.
        comparison: `compare` of the same prompts, for labels and predictions.
        prepend_bos: put BOS first; None for the model's default.
        batch_size: sequences run together; by default what fits into memory.

    Raises:
        OptionError: several demonstration sets, no factors, other queries than the comparison's, no predictions.
        UnsupportedModelError: heads that together are not as wide as the model, which the format cannot hold.
    """
    wrapped = wrap(model)
    info = wrapped.info
    if info.n_heads * info.d_head != info.d_model:
        raise UnsupportedModelError(
            f"record files hold query vectors of the model's width {info.d_model}, but {info.n_heads} heads of "
            f"{info.d_head} are {info.n_heads * info.d_head} wide in {info.name}."
        )
    labels = _labels(prompts, comparison)
    factors = usable_factors(update)
    if factors is None:
        raise OptionError(
            "the finetuning pass is recorded demonstration by demonstration: finetune with keep_factors=True, "
            "batch_size=1, epochs=1 and order='given'."
        )
    tokenized = tokenize_all(wrapped, prompts, prepend_bos=prepend_bos, require_demos=True)
    if len(prompt_groups(tokenized)) > 1:
        raise OptionError("a recording holds one demonstration set: write each set to a folder of its own.")
    kinds: dict[str, list[QueryRecord | None]] = {kind: [None] * len(prompts) for kind in ("zs", "icl", "ft")}
    wanted = Wanted(("icl", "zs", "ft"), update, keep=Keep(raw_q=True))
    for indices, batch in record_batches(wrapped, tokenized, wanted, batch_size=batch_size):
        for index, runs in zip(indices, batch, strict=True):
            for kind, run in runs.items():
                gold, predicted = labels["gold"][index], labels[kind][index]
                kinds[kind][index] = _query(wrapped, run, update, gold, predicted)
    zs, icl, ft = ([record for record in kinds[kind] if record is not None] for kind in ("zs", "icl", "ft"))
    has_start = tokenized[0].bos is not None
    demos = [q.transpose(0, 1) for q in demonstration_queries(wrapped, factors)]  # [layer, src, d_q]
    demos = demos if has_start else [torch.nn.functional.pad(q, (0, 0, 1, 0)) for q in demos]
    return write_records(directory, zs=zs, icl=icl, ftzs=ft, ft=[DemoRecord(q) for q in demos])


def _labels(prompts: Sequence[ICLPrompt], comparison: Comparison) -> dict[str, list[int]]:
    found = {name: getattr(comparison, name) for name in ("gold", "zs", "icl", "ft")}
    if any(t is None for t in found.values()) or bool((found["gold"] < 0).any()):
        raise OptionError("records need gold labels and predictions: give every prompt a label and candidates.")
    if len(comparison.n_demos) != 1 or len(comparison.sets) != len(prompts):
        raise OptionError(
            f"the comparison is of {len(comparison.sets)} queries behind {len(comparison.n_demos)} demonstration sets, "
            f"not of these {len(prompts)} prompts: compare exactly these, one set at a time."
        )
    return {name: tensor.tolist() for name, tensor in found.items()}


def _query(model: LensModel, run: Run, update: WeightUpdate, gold: int, predicted: int) -> QueryRecord:
    """One query in one setting, at its last token."""
    changed = run.setting == "ft"
    w_o, b_o = (update.w_o, update.b_o) if changed else (None, None)
    return QueryRecord(
        attn_out=_recorded(attention_output(model, run, w_o=w_o, b_o=b_o)[-1]),
        attn_map=_recorded(own_scores(run)[-1]),
        gold_label=gold,
        pred_label=predicted,
        attn_map_ctx=_context(run) if run.setting == "icl" else None,
        attn_q=_recorded(scaled_queries(run)[-1]) if changed else None,
    )


def _context(icl: Run) -> Float[Tensor, "layer context"]:
    """Scores, summed over heads, in the layout ``start token, demonstration, separator, demonstration ...``."""
    tokens = icl.tokens
    lengths = [label.stop - demo.start for demo, label in zip(tokens.demos, tokens.labels, strict=True)]
    found = _recorded(demo_scores(icl)[-1].sum(-2))
    blank = found.new_zeros(len(found), 1)
    parts = [blank]
    for scores in torch.split(found, lengths, dim=-1):
        parts += [scores, blank]
    return torch.cat(parts, dim=-1)


def _recorded(tensor: Tensor) -> Tensor:
    """In float32 or float64, on the CPU."""
    return at_least_float32(tensor.detach()).cpu()
