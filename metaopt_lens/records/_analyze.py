"""All published metrics of a recording, streamed: `analyze_records`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens._threads import torch_threads
from metaopt_lens.analysis import Context, Convention, QueryStatistic, mean_interval, rec2ftp
from metaopt_lens.records._record_analysis import LayerMetric, RecordAnalysis, RecordShapes
from metaopt_lens.records._record_files import open_recording
from metaopt_lens.records._record_metrics import chance, training_metrics, update_metrics
from metaopt_lens.records._recorded import RecordedDemos, read_recorded_demos, read_recorded_queries, read_sizes

_TOGETHER = 16  # queries worked on together
_TRAINING_TOGETHER = 48  # the same where every chunk goes once over all demonstration tokens
_TOP_K = {"example": 5, "token": 100}


def analyze_records(
    directory: str | os.PathLike[str],
    *,
    convention: Convention = Convention.DEFAULT,
    top_k: Mapping[str, int] | None = None,
    null_draws: int = 2,
    level: float = 0.95,
    seed: int = 0,
    workers: int | None = None,
) -> RecordAnalysis:
    """Every metric of Dai et al. 2022 and Deutch et al. 2023 from a recording in the published layout.

    Args:
        directory: folder with ``zs/``, ``icl/``, ``ftzs/`` and ``ft/``.
        convention: what the metrics do where their definitions leave a choice; `Convention.PUBLISHED` reproduces the
            published programs.
        top_k: how many entries count as top at ``example`` and at ``token`` level; 5 and 100 if not given.
        null_draws: random vectors and other queries drawn per query.
        level: coverage of the t intervals over queries: a recording is one demonstration set.
        seed: of nulls.
        workers: processes that parse the files; by the files' size if not given, 0 for none.

    Raises:
        FileFormatError: a missing or damaged file (file and line are named), or records that do not fit together.
        OptionError: an option out of its range.
    """
    _check_options(top_k or {}, null_draws=null_draws, level=level)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[QueryStatistic | str]] = {}
    correct: dict[str, list[Tensor]] = {"zs": [], "icl": [], "ftzs": []}
    waiting: list[tuple[Tensor, Tensor]] = []
    # The parsing processes have the cores: torch threads that compete with them are many times slower.
    with torch_threads(1):
        recording = open_recording(directory, workers=workers)
        n, done, longest = recording.n_queries, 0, 0
        unread = n if convention.training_limit is None else min(n, convention.training_limit)
        sizes = read_sizes(recording)
        context = Context(convention, generator, null_draws, {**_TOP_K, **(top_k or {})}, sizes.hidden)
        demos = read_recorded_demos(recording, sizes)
        for queries in read_recorded_queries(recording, sizes, at_most=_TOGETHER):
            found = update_metrics(queries, context)
            done += len(queries.lengths)
            longest = max(longest, int(queries.lengths.max()))
            waiting.append((queries.context, queries.attn_q))
            if sum(len(scores) for scores, _ in waiting) >= _TRAINING_TOGETHER or done == n:
                scores, attn_q = (torch.cat(tensors)[:unread] for tensors in zip(*waiting, strict=True))
                unread -= len(scores)
                waiting.clear()
                if len(scores):
                    found |= training_metrics(scores, attn_q, demos, context)
            for name, part in found.items():
                parts.setdefault(name, []).append(part)
            for kind, answers in correct.items():
                answers.append(queries.correct(kind))
    zs, icl, ft = (torch.cat(answers) for answers in correct.values())
    return RecordAnalysis(
        convention=convention,
        shapes=RecordShapes(
            n_queries=n,
            n_layers=sizes.n_layers,
            n_heads=sizes.n_heads,
            hidden=sizes.hidden,
            n_demonstrations=len(demos.lengths),
            retained_demo_tokens=int(demos.lengths.sum()),
            context_len=sizes.context_len,
            max_query_len=longest,
        ),
        rec2ftp=rec2ftp(zs, icl, ft),
        f2t=~zs & icl & ft,
        metrics=_metrics(parts, demos, context, level),
        notes=_notes(convention, demos, n),
    )


def _check_options(top_k: Mapping[str, int], *, level: float, **counts: int) -> None:
    """Before any file is read, as that can take minutes."""
    if unknown := set(top_k) - set(_TOP_K):
        raise OptionError(f"top_k has the keys 'example' and 'token', got {sorted(unknown)}.")
    for name, count in {**counts, **{f"top_k[{key!r}]": k for key, k in top_k.items()}}.items():
        if count < 1:
            raise OptionError(f"{name} must be at least 1, got {count}.")
    if not 0 < level < 1:
        raise OptionError(f"level must lie between 0 and 1, got {level}: 0.95 gives 95 % intervals.")


def _metrics(
    parts: Mapping[str, list[QueryStatistic | str]], demos: RecordedDemos, context: Context, level: float
) -> dict[str, LayerMetric]:
    strict = context.convention.strict_means
    metrics = {}
    for name, found in parts.items():
        undefined = next((part for part in found if isinstance(part, str)), None)
        if undefined is not None:
            metrics[name] = LayerMetric(name, None, undefined)
            continue
        joined = QueryStatistic.concatenate([part for part in found if isinstance(part, QueryStatistic)])
        interval = mean_interval(joined, level=level) if bool(joined.n_defined.all()) else None
        metrics[name] = LayerMetric(name, joined, interval=interval, strict=strict)
    for name, null in chance({name: m.layers() for name, m in metrics.items()}, demos, context).items():
        if metrics[name].per_query is not None:
            metrics[name] = replace(metrics[name], null=null)
    return metrics


def _notes(convention: Convention, demos: RecordedDemos, n_queries: int) -> tuple[str, ...]:
    notes = []
    if demos.n_unused:
        used = len(demos.lengths)
        notes.append(
            f"the context holds the first {used} of {used + demos.n_unused} demonstrations: the rest is unused"
        )
    centred = "centred over the query's tokens" if convention.centres_maps else "not centred"
    undefined = "count as 0" if convention.damping else "are left out"
    notes.append(f"{convention.name} choices: attention maps are {centred}; undefined cosines {undefined}")
    limit = convention.training_limit
    if limit is not None and n_queries > limit:
        notes.append(f"attention to training tokens uses the first {limit} of {n_queries} queries")
    notes.append("nulls: SimAOU analytic, SimAOU unnormalised other query, kendall 0, recall_topk k/n")
    return tuple(notes)
