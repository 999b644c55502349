"""Score candidate labels for many queries behind one shared prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.models import Hook, LensModel, Prefix, Readout
from metaopt_lens.runs._batching import choose_batch_size, map_batches
from metaopt_lens.runs._prompt_run import Run

Scoring = Literal["mean", "first"]


def check_candidates(candidates: Sequence[Sequence[int]], names: Sequence[str], *, scoring: Scoring = "mean") -> None:
    """Raise `PromptError` if two candidate labels cannot be told apart.

    Args:
        candidates: token ids of each label.
        names: the labels as text, for the message.
        scoring: ``"mean"`` log-probability of the label's tokens, or that of its ``"first"`` token only.
    """
    if scoring not in {"mean", "first"}:
        raise OptionError(f"scoring must be 'mean' or 'first', got {scoring!r}.")
    if len(candidates) < 2:
        raise PromptError(f"scoring needs at least two candidate labels, got {list(names)}.")
    seen: dict[tuple[int, ...], str] = {}
    for ids, name in zip(candidates, names, strict=True):
        key = scored_tokens(ids, scoring)
        if key in seen:
            what = "share their first token" if tuple(ids) != key or scoring == "first" else "have the same token ids"
            hint = "; score whole labels with scoring='mean'" if scoring == "first" else ""
            raise PromptError(f"the candidate labels {seen[key]!r} and {name!r} {what}{hint}.")
        seen[key] = name


@dataclass(frozen=True)
class QueryReading:
    """What a model says after one query.

    Attributes:
        scores: mean log-probability per token of each candidate.
        log_probs: log-probability of each whole candidate, the sum over its tokens.
        ranks: rank of each candidate's first token among all tokens of the vocabulary; 1 is the most probable.
        top: the most probable next tokens, as (id, probability), the first one first.
    """

    scores: Float[Tensor, " candidate"]
    log_probs: Float[Tensor, " candidate"]
    ranks: Int[Tensor, " candidate"]
    top: tuple[tuple[int, float], ...]


def read_queries(
    model: LensModel,
    prefix: Prefix | None,
    queries: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    *,
    n_top: int = 5,
    hooks: Sequence[Hook] = (),
    batch_size: int | None = None,
) -> list[QueryReading]:
    """Probabilities of the candidates after every query, and of the model's own first choices.

    Logits are computed only at the positions that predict a label (of the whole vocabulary, for the normaliser and the
    ranks).

    Args:
        model: a wrapped model.
        prefix: what all queries stand behind (see `run_shared_prefix`); None for nothing.
        queries: token ids of each query.
        candidates: token ids of the labels, may be empty; one-token labels cost one pass per query, whatever their
            number.
        n_top: how many of the most probable next tokens to keep.
        hooks: interventions, attached to every pass.
        batch_size: sequences run together; by default as many as memory allows.

    Returns:
        One reading per query; log-probabilities computed in float32 at least.

    Raises:
        ContextWindowError: a query with its prefix and label does not fit the context window.
    """
    labels = [tuple(c) for c in candidates]
    # A label's tokens but the last are fed; labels of one token are read off any row.
    fed = sorted({label[:-1] for label in labels if len(label) > 1}) or [()]
    rows = [(index, head, tuple(query) + head) for index, query in enumerate(queries) for head in fed]
    longest = max(len(tokens) for _, _, tokens in rows)
    n_prefix = 0 if prefix is None else prefix.n_tokens
    model.check_window(n_prefix + longest + 1, "the longest query with its prefix and label")

    def run(batch: list[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> list[_Row]:
        tokens = pad_sequence([torch.tensor(ids) for _, _, ids in batch], batch_first=True)
        at = [torch.arange(len(queries[index]) - 1, len(ids)) for index, _, ids in batch]
        read = Readout(pad_sequence(at, batch_first=True))
        logits = model.run(tokens, prefix=prefix, hooks=hooks, read=read)
        assert logits is not None
        found = []
        for row, (_, head, _) in enumerate(batch):
            log_probs = logits[row, : len(head) + 1].to(_score_dtype(logits)).log_softmax(-1)
            sums = {}
            for number, label in enumerate(labels):
                if label[:-1] == head or (len(label) == 1 and head == fed[0]):
                    steps = torch.arange(len(label), device=log_probs.device)
                    sums[number] = float(log_probs[steps, torch.tensor(label, device=log_probs.device)].sum())
            found.append(_Row(sums, *_first_choices(log_probs[0], labels, n_top)) if head == fed[0] else _Row(sums))
        return found

    n_read = 1 + max(map(len, fed))
    size = batch_size or choose_batch_size(model, n_new=longest, n_prefix=n_prefix, n_read=n_read)
    outputs = map_batches(rows, lambda row: len(row[2]), run, batch_size=size)
    lengths = torch.tensor([len(label) for label in labels], dtype=torch.float64)
    readings = []
    for start in range(0, len(rows), len(fed)):
        parts = outputs[start : start + len(fed)]
        sums = {number: value for part in parts for number, value in part.sums.items()}
        log_probs = torch.tensor([sums[number] for number in range(len(labels))], dtype=torch.float64)
        readings.append(
            QueryReading(
                scores=log_probs / lengths,
                log_probs=log_probs,
                ranks=torch.tensor(parts[0].ranks, dtype=torch.int64),
                top=parts[0].top,
            )
        )
    return readings


def read_run(run: Run, candidates: Sequence[Sequence[int]]) -> QueryReading:
    """`read_queries` out of a recorded run at its last destination, without another pass.

    Args:
        run: recorded with ``Keep(logits=...)`` of all candidates, and as many of ``n_top`` as are wanted.
        candidates: token ids of the labels, one each.

    Returns:
        The same numbers as a pass of its own gives.

    Raises:
        OptionError: a candidate of several tokens, or one whose logits were not kept.
    """
    if run.logits is None or run.log_normaliser is None or run.ranks is None:
        raise OptionError("the run has no logits: record the prompt with keep=Keep(logits=...).")
    for label in candidates:
        if len(label) != 1 or label[0] not in run.asked:
            raise OptionError(
                f"the run has logits of tokens {list(run.asked)}, and the candidate {list(label)} is not one of these: "
                "read_queries runs what is missing."
            )
    at = torch.tensor([run.asked.index(label[0]) for label in candidates], dtype=torch.long)
    logits, normaliser = run.logits[-1].detach().cpu(), run.log_normaliser[-1].detach().cpu()
    log_probs = (logits[at] - normaliser).double()
    top: tuple[tuple[int, float], ...] = ()
    if run.top_tokens is not None and run.top_logits is not None:
        probabilities = (run.top_logits[-1].detach().cpu() - normaliser).exp()
        top = tuple(zip(run.top_tokens[-1].tolist(), probabilities.tolist(), strict=True))
    return QueryReading(scores=log_probs, log_probs=log_probs, ranks=run.ranks[-1].cpu()[at], top=top)


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
    """Mean log-probability of every candidate's tokens after every query (see `read_queries`).

    Args:
        model: a wrapped model.
        prefix: what all queries stand behind (see `run_shared_prefix`); None for nothing.
        queries: token ids of each query.
        candidates: token ids of the labels.
        scoring: ``"mean"`` over the label's tokens, or that of its ``"first"`` token only.
        hooks: interventions, attached to every pass.
        batch_size: sequences run together; by default as many as memory allows.

    Returns:
        Scores in float64, whatever the model computes in.
    """
    labels = [scored_tokens(c, scoring) for c in candidates]
    readings = read_queries(model, prefix, queries, labels, n_top=1, hooks=hooks, batch_size=batch_size)
    return torch.stack([reading.scores for reading in readings])


def scored_tokens(label: Sequence[int], scoring: Scoring) -> tuple[int, ...]:
    """The tokens of a label that count: all of them, or the ``"first"``."""
    return tuple(label[:1] if scoring == "first" else label)


def candidate_mass(log_probs: Float[Tensor, " candidate"], candidates: Sequence[Sequence[int]]) -> float:
    """Probability that the model's answer begins with one of the candidates.

    A candidate whose tokens begin with another candidate's ("red", "red wine") is contained in it and adds nothing.

    Args:
        log_probs: of the whole candidates (see `QueryReading`).
        candidates: their token ids, all different.
    """
    labels = [tuple(c) for c in candidates]
    alone = [not any(other != label and label[: len(other)] == other for other in labels) for label in labels]
    return float(log_probs[torch.tensor(alone, dtype=torch.bool)].exp().sum())


@dataclass(frozen=True)
class _Row:
    """What one row of a batch gives: sums of the labels read off it, and the next token's ranks, on the first row."""

    sums: dict[int, float]
    ranks: tuple[int, ...] = ()
    top: tuple[tuple[int, float], ...] = ()


def _first_choices(
    log_probs: Float[Tensor, " d_vocab"], labels: Sequence[tuple[int, ...]], n_top: int
) -> tuple[tuple[int, ...], tuple[tuple[int, float], ...]]:
    """Ranks of the labels' first tokens, and the most probable tokens."""
    ranks = tuple(1 + int((log_probs > log_probs[label[0]]).sum()) for label in labels)
    best = log_probs.topk(min(n_top, len(log_probs)))
    return ranks, tuple(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True))


def _score_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
