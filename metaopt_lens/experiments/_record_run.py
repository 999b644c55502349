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
from metaopt_lens.analysis import Comparison, SetRecord, demonstration_queries, record_set, usable_factors
from metaopt_lens.experiments._records import DemoRecord, QueryRecord, write_records
from metaopt_lens.extraction import tokenize_for
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.models import wrap
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt


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
        prompts: queries behind one set of demonstrations. update: of that set, with ``keep_factors=True``.
        comparison: `compare` of the same prompts, for labels and predictions.

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
    tokenized = [tokenize_for(wrapped, p, prepend_bos=prepend_bos, require_demos=True) for p in prompts]
    if len({(t.ids[: t.query.start], t.demos) for t in tokenized}) > 1:
        raise OptionError("a recording holds one demonstration set: write each set to a folder of its own.")
    record = record_set(wrapped, tokenized, update, subspace_dim=1, batch_size=batch_size)
    has_start = tokenized[0].bos is not None
    demos = [q.transpose(0, 1) for q in demonstration_queries(wrapped, factors)]  # [layer, src, d_q]
    demos = demos if has_start else [torch.nn.functional.pad(q, (0, 0, 1, 0)) for q in demos]
    return write_records(
        directory,
        zs=_queries(record, "zs", labels),
        icl=_queries(record, "icl", labels, context=_context(record, tokenized[0])),
        ftzs=_queries(record, "ft", labels),
        ft=[DemoRecord(q) for q in demos],
    )


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


def _queries(
    r: SetRecord, setting: str, labels: dict[str, list[int]], *, context: Tensor | None = None
) -> list[QueryRecord]:
    hidden, scores = getattr(r, f"hidden_{setting}"), getattr(r, f"scores_{setting}")
    return [
        QueryRecord(
            attn_out=hidden[i],
            attn_map=scores[i, ..., :length],
            gold_label=labels["gold"][i],
            pred_label=labels[setting][i],
            attn_map_ctx=None if context is None else context[i],
            attn_q=r.queries_ft[i] if setting == "ft" else None,
        )
        for i, length in enumerate(r.lengths.tolist())
    ]


def _context(r: SetRecord, prompt: TokenizedPrompt) -> Float[Tensor, "query layer context"]:
    """Scores in the layout ``start token, demonstration, separator, demonstration, separator ...``."""
    lengths = [label.stop - demo.start for demo, label in zip(prompt.demos, prompt.labels, strict=True)]
    blank = r.context_scores.new_zeros(*r.context_scores.shape[:2], 1)
    parts = [blank]
    for scores in torch.split(r.context_scores, lengths, dim=-1):
        parts += [scores, blank]
    return torch.cat(parts, dim=-1)
