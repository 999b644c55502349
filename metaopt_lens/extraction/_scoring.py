"""Score candidate labels for many queries behind one shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.extraction._batching import choose_batch_size, map_batches
from metaopt_lens.models import Hook, LensModel, Prefix

Scoring = Literal["mean", "first"]


def check_candidates(candidates: Sequence[Sequence[int]], names: Sequence[str], *, scoring: Scoring = "mean") -> None:
    """Raise `PromptError` if two candidate labels cannot be told apart.

    Args:
        candidates: token ids of each label; names: the labels as text, for the message.
        scoring: ``"mean"`` log-probability of the label's tokens, or that of its ``"first"`` token only.
    """
    if scoring not in {"mean", "first"}:
        raise OptionError(f"scoring must be 'mean' or 'first', got {scoring!r}.")
    if len(candidates) < 2:
        raise PromptError(f"scoring needs at least two candidate labels, got {list(names)}.")
    seen: dict[tuple[int, ...], str] = {}
    for ids, name in zip(candidates, names, strict=True):
        key = tuple(ids[:1] if scoring == "first" else ids)
        if key in seen:
            what = "share their first token" if tuple(ids) != key or scoring == "first" else "have the same token ids"
            hint = "; score whole labels with scoring='mean'" if scoring == "first" else ""
            raise PromptError(f"the candidate labels {seen[key]!r} and {name!r} {what}{hint}.")
        seen[key] = name


def score_candidates(
    model: LensModel,
    prefix: Prefix | None,
    queries: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    *,
    scoring: Scoring = "mean",
    hooks: Sequence[Hook] = (),
    batch_size: int | None = None,
) -> Float[Tensor, "query candidate"]:
    """Mean log-probability of every candidate's tokens after every query, in float32 at least.

    Args:
        prefix: what all queries stand behind (see `run_shared_prefix`); None for nothing.
        candidates: token ids of the labels; one-token labels cost one pass per query, whatever their number.
        hooks: interventions, attached to every pass.
        batch_size: sequences run together; by default as many as memory allows.
    """
    labels = [tuple(c[:1]) if scoring == "first" else tuple(c) for c in candidates]
    # A label's tokens but the last are fed; labels of one token are read off any row.
    fed = sorted({label[:-1] for label in labels if len(label) > 1}) or [()]
    rows = [(index, head, tuple(query) + head) for index, query in enumerate(queries) for head in fed]
    longest = max(len(tokens) for _, _, tokens in rows)
    n_prefix = 0 if prefix is None else prefix.n_tokens
    model.check_window(n_prefix + longest + 1, "the longest query with its prefix and label")

    def run(batch: list[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> list[dict[int, Tensor]]:
        tokens = torch.zeros(len(batch), max(len(t) for _, _, t in batch), dtype=torch.long)
        for row, (_, _, ids) in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
        logits = model.run(tokens, prefix=prefix, hooks=hooks)
        assert logits is not None
        found = []
        for row, (index, head, _) in enumerate(batch):
            first = len(queries[index]) - 1
            log_probs = logits[row, first : first + len(head) + 1].to(_score_dtype(logits)).log_softmax(-1)
            scores = {}
            for number, label in enumerate(labels):
                if label[:-1] == head or (len(label) == 1 and head == fed[0]):
                    steps = torch.arange(len(label), device=log_probs.device)
                    scores[number] = log_probs[steps, torch.tensor(label, device=log_probs.device)].mean().cpu()
            found.append(scores)
        return found

    size = batch_size or choose_batch_size(model, n_new=longest, n_prefix=n_prefix)
    scored = map_batches(rows, lambda row: len(row[2]), run, batch_size=size)
    table = torch.empty(len(queries), len(labels), dtype=torch.float64)
    for (index, _, _), scores in zip(rows, scored, strict=True):
        for number, value in scores.items():
            table[index, number] = value
    return table


def _score_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
