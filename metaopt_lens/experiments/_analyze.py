"""All published metrics of a recording, streamed: `analyze_records`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens._threads import torch_threads
from metaopt_lens.analysis import (
    QueryStatistic,
    context_columns,
    cosine,
    finetuning_scores,
    kendall_tau,
    mean_interval,
    other_query_null,
    random_null,
    rec2ftp,
    sim_am,
    sim_aou,
    topk_recall,
    training_attention,
    unit,
)
from metaopt_lens.experiments._analysis_result import LayerMetric, RecordAnalysis, RecordShapes
from metaopt_lens.experiments._records import Fields, RecordIndex, open_recording

_SETTINGS = ("zs", "icl", "ftzs")
_CHUNK = 16  # queries worked on together
_TRAINING_CHUNK = 48  # the same where every chunk goes once over all demonstration tokens
_PUBLISHED_LIMIT = 100  # queries read by the published training-attention program
_TOP_K = {"example": 5, "token": 100}

_Found = dict[str, QueryStatistic | str]  # a string says why the metric is undefined


@dataclass(frozen=True)
class _Options:
    reference: bool
    top_k: Mapping[str, int]
    null_draws: int
    generator: torch.Generator


@dataclass(frozen=True)
class _Demos:
    """Query vectors of the demonstration tokens in the finetuning pass, start tokens left out."""

    attn_q: Float[Tensor, "src layer d_model"]
    lengths: Int[Tensor, " demo"]
    note: str | None = None


@dataclass(frozen=True)
class _Chunk:
    """Some queries, stacked; attention maps are filled up with zeros."""

    attn_out: dict[str, Float[Tensor, "query layer d_model"]]
    attn_map: dict[str, Float[Tensor, "query layer head pos"]]
    lengths: Int[Tensor, " query"]
    context: Float[Tensor, "query layer src"]
    attn_q: Float[Tensor, "query layer d_model"]


def analyze_records(
    directory: str | os.PathLike[str],
    *,
    reference: bool = False,
    top_k: Mapping[str, int] | None = None,
    null_draws: int = 2,
    level: float = 0.95,
    seed: int = 0,
    workers: int | None = None,
) -> RecordAnalysis:
    """Every metric of Dai et al. 2022 and Deutch et al. 2023 from a recording in the published layout.

    Args:
        directory: folder with ``zs/``, ``icl/``, ``ftzs/`` and ``ft/``.
        reference: reproduce the published programs' choices. They differ from the default in that they count
            an undefined cosine as 0, compare attention maps without centring, rank softmax weights that may
            have underflowed, break ties at the k-th place by accident, read at most 100 queries for the
            attention to training tokens, and draw an all-positive random baseline.
        top_k: how many entries count as top at ``example`` and at ``token`` level; 5 and 100 if not given.
        null_draws: random vectors and other queries drawn per query.
        level: coverage of the t intervals over queries: a recording is one demonstration set.
        seed: of nulls.
        workers: processes that parse the files; by the files' size if not given, 0 for none.
    """
    _check_options(top_k or {}, null_draws=null_draws, level=level)
    generator = torch.Generator().manual_seed(seed)
    options = _Options(reference, {**_TOP_K, **(top_k or {})}, null_draws, generator)
    found: dict[str, list[QueryStatistic | str]] = {}
    labels: list[list[int]] = []
    waiting: list[tuple[Tensor, Tensor]] = []
    longest = compared = 0
    # The parsing processes have the cores: torch threads beside them wait for each other, many times slower.
    with torch_threads(1), open_recording(directory, workers) as (index, parse):
        n = index.n_queries
        (first,) = parse(index.lines["icl"][:1])
        demos = _stack_demos(index, parse(index.lines["ft"]), first)
        lines = [index.lines[kind][i] for i in range(n) for kind in _SETTINGS]
        queries = _checked(index, parse(lines), first)
        for start, size in _chunk_sizes(n):
            records = list(islice(queries, size))
            chunk = _stack(records)
            metrics = _similarities(chunk, options)
            waiting.append((chunk.context, chunk.attn_q))
            if sum(len(context) for context, _ in waiting) >= _TRAINING_CHUNK or start + size == n:
                limit = max(0, _PUBLISHED_LIMIT - compared) if reference else n
                context, attn_q = (torch.cat(parts)[:limit] for parts in zip(*waiting, strict=True))
                compared += len(context)
                waiting.clear()
                if len(context):
                    metrics |= _training_metrics(context, attn_q, demos, options)
            for name, statistic in metrics.items():
                found.setdefault(name, []).append(statistic)
            labels += [[r["zs"]["gold_label"], *(r[kind]["pred_label"] for kind in _SETTINGS)] for r in records]
            longest = max(longest, int(chunk.lengths.max()))
    gold, *predicted = torch.tensor(labels).T
    right = dict(zip(_SETTINGS, (label == gold for label in predicted), strict=True))
    return RecordAnalysis(
        reference=reference,
        shapes=RecordShapes(
            n_queries=n,
            n_layers=chunk.attn_q.shape[1],
            n_heads=chunk.attn_map["zs"].shape[2],
            hidden=chunk.attn_q.shape[2],
            n_demonstrations=len(demos.lengths),
            retained_demo_tokens=int(demos.lengths.sum()),
            context_len=chunk.context.shape[-1],
            max_query_len=longest,
        ),
        rec2ftp=rec2ftp(right["zs"], right["icl"], right["ftzs"]),
        f2t=~right["zs"] & right["icl"] & right["ftzs"],
        metrics=_with_nulls(found, demos, options, level),
        notes=_notes(options, demos, n),
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


def _similarities(chunk: _Chunk, options: _Options) -> _Found:
    reference = options.reference
    raw = [chunk.attn_out[kind] for kind in _SETTINGS]
    aou = sim_aou(raw[1], raw[0], raw[2], reference=reference)
    zs, icl, ft = (hidden.double() for hidden in raw)
    units = [unit(hidden, reference=reference).nan_to_num() for hidden in (icl, zs, ft)]  # zero has no direction
    updates = units[0] - units[1], units[2] - units[1]
    settings: dict[str, Any] = {
        "n_draws": options.null_draws,
        "seed": options.generator,
        "similarity": partial(cosine, reference=reference),
    }
    random = random_null(*updates, reference=reference, **settings)
    found: _Found = {
        "SimAOU": aou.normalised,
        "SimAOU unnormalised": aou.plain,
        "SimAOU null": aou.null,
        "SimAOU random": QueryStatistic(random.values.nanmean(0), aou.normalised.undefined_because),
    }
    for name, pair in (
        ("SimAOU other query", updates),
        ("SimAOU unnormalised other query", (icl - zs, ft - zs)),
    ):
        if len(icl) > 1:
            values = other_query_null(*pair, **settings).values.nanmean(0)
            values = torch.where(aou.plain.defined, values, torch.nan)
            found[name] = QueryStatistic(values, aou.plain.undefined_because)
        else:
            found[name] = "there is no other query"
    maps = [chunk.attn_map[kind] for kind in ("icl", "ftzs", "zs")]
    pairs = {
        "SimAM": (maps[0], maps[1], None),
        "ZSL SimAM": (maps[0], maps[2], None),
        "ICL-FTZS SimAM": (maps[0], maps[1], maps[2]),
    }
    for name, (first, second, zero) in pairs.items():
        found[name] = sim_am(first, second, baseline=zero, lengths=chunk.lengths, reference=reference).per_query
    return found


def _training_metrics(context: Tensor, attn_q: Tensor, demos: _Demos, options: _Options) -> _Found:
    scores = finetuning_scores(demos.attn_q, attn_q)
    kept = context[:, :, context_columns(demos.lengths)]
    attention = training_attention(kept, scores, demos.lengths, reference=options.reference)
    found: _Found = {}
    levels = {
        "example": (attention.icl_example, attention.ft_example),
        "token": (attention.icl_token, attention.ft_token),
    }
    for level, pair in levels.items():
        found[f"{level}-level kendall"] = kendall_tau(*pair, reference=options.reference)
        k, available = options.top_k[level], pair[0].shape[-1]
        if k > available:
            found[f"{level}-level recall_topk"] = f"top-{k} needs {k} entries, the recording has {available}"
        else:
            recall = topk_recall(*pair, k=k, reference=options.reference)
            found[f"{level}-level recall_topk"] = recall.per_query
    return found


def _with_nulls(
    found: dict[str, list[QueryStatistic | str]], demos: _Demos, options: _Options, level: float
) -> dict[str, LayerMetric]:
    n_layers = demos.attn_q.shape[1]
    metrics: dict[str, LayerMetric] = {}
    for name, parts in found.items():
        reasons = [part for part in parts if isinstance(part, str)]
        if reasons:
            metrics[name] = LayerMetric(name, None, reasons[0])
            continue
        joined = QueryStatistic.concatenate([part for part in parts if isinstance(part, QueryStatistic)])
        metrics[name] = LayerMetric(
            name,
            joined,
            interval=mean_interval(joined, level=level) if bool(joined.n_defined.all()) else None,
            strict=options.reference,
        )
    nulls: dict[str, list[float | None]] = {
        "SimAOU": metrics["SimAOU null"].layers(),
        "SimAOU unnormalised": metrics["SimAOU unnormalised other query"].layers(),
    }
    for kind, available in (("example", len(demos.lengths)), ("token", int(demos.lengths.sum()))):
        nulls[f"{kind}-level kendall"] = [0.0] * n_layers
        nulls[f"{kind}-level recall_topk"] = [options.top_k[kind] / available] * n_layers
    for name, layers in nulls.items():
        values = tuple(value for value in layers if value is not None)
        metric = metrics[name]
        if len(values) == n_layers and metric.per_query is not None:
            metrics[name] = LayerMetric(name, metric.per_query, None, values, metric.interval, metric.strict)
    return metrics


def _notes(options: _Options, demos: _Demos, n_queries: int) -> tuple[str, ...]:
    notes = [] if demos.note is None else [demos.note]
    if options.reference:
        notes.append("the published programs' choices: undefined cosines count as 0, attention maps are not centred")
        if n_queries > _PUBLISHED_LIMIT:
            notes.append(f"attention to training tokens uses the first {_PUBLISHED_LIMIT} of {n_queries} queries")
    else:
        notes.append("attention maps are centred over the query's tokens; undefined cosines are left out")
    notes.append("nulls: SimAOU analytic, SimAOU unnormalised other query, kendall 0, recall_topk k/n")
    return tuple(notes)


def _stack_demos(index: RecordIndex, parsed: Iterator[Fields], first: Fields) -> _Demos:
    """Join the query vectors of the demonstrations that the context holds, without their start tokens.

    Prompts drop demonstrations beyond the window, finetuning does not: those are left out.
    """
    width, n_columns, n_records = first["self_attn_out_hiddens"].shape, first["attn_map_ctx"].shape[1], 0
    joined = torch.empty(max(0, n_columns - 1), *width, dtype=torch.float32)
    lengths: list[int] = []
    end = 1
    while end < n_columns and (fields := next(parsed, None)) is not None:
        place, array = index.place("ft", n_records := n_records + 1), fields["attn_q"]
        _check_sizes(place, "attn_q", array.shape, (width[0], array.shape[1], width[1]))
        if array.shape[1] < 2:
            raise FileFormatError(
                f"{place} holds a single token: a demonstration needs its start token and at least one more. "
                "Delete it from the recording."
            )
        start = sum(lengths)
        lengths.append(array.shape[1] - 1)
        end += lengths[-1] + 1
        if end <= n_columns:
            if array.dtype == np.float64 and joined.dtype == torch.float32:
                joined = joined.double()
            joined[start : start + lengths[-1]] = torch.from_numpy(array)[:, 1:].transpose(0, 1)
    n_available = len(index.lines["ft"])
    if end != n_columns or not lengths:
        raise FileFormatError(
            f"{index.place('icl', 1)} has a context of {n_columns} tokens, which no number of the "
            f"{n_available} demonstrations in ft fills: {len(lengths)} of them make {end} (a start token, then "
            "each demonstration and one separator). Record icl and ft with the same demonstrations."
        )
    note = None
    if len(lengths) < n_available:
        note = f"the context holds the first {len(lengths)} of {n_available} demonstrations: the rest is unused"
    return _Demos(joined[: sum(lengths)], torch.tensor(lengths), note)


def _checked(index: RecordIndex, parsed: Iterator[Fields], first: Fields) -> Iterator[dict[str, Fields]]:
    """The three records of each query, once their sizes and labels are seen to agree."""
    hidden, n_columns = first["self_attn_out_hiddens"].shape, first["attn_map_ctx"].shape[1]
    for number in range(1, index.n_queries + 1):
        record = {kind: next(parsed) for kind in _SETTINGS}
        zs = record["zs"]
        maps = (hidden[0], first["attn_map"].shape[1], zs["attn_map"].shape[2])
        needed = {"self_attn_out_hiddens": hidden, "attn_map": maps, "attn_q": hidden}
        needed["attn_map_ctx"] = (hidden[0], n_columns)
        for kind, fields in record.items():
            place = index.place(kind, number)
            for name, sizes in needed.items():
                if name in fields:
                    _check_sizes(place, name, fields[name].shape, sizes)
            if fields["gold_label"] != zs["gold_label"]:
                raise FileFormatError(
                    f"{place} has gold label {fields['gold_label']}, but zs has {zs['gold_label']} there: "
                    "the settings must hold the same queries in the same order."
                )
        yield record


def _check_sizes(place: str, field: str, came: Iterable[int], needed: Iterable[int]) -> None:
    if tuple(came) != tuple(needed):
        raise FileFormatError(
            f"{place} has '{field}' of sizes {tuple(came)}, but the other records need {tuple(needed)}: "
            "layers, heads, widths, query tokens and context must agree. Record all settings with one model "
            "and one set of queries and demonstrations."
        )


def _chunk_sizes(n: int) -> Iterator[tuple[int, int]]:
    """Starts and sizes of nearly equal chunks, none of a single query unless there is only one."""
    n_chunks = -(-n // _CHUNK)
    for i in range(n_chunks):
        start = n * i // n_chunks
        yield start, n * (i + 1) // n_chunks - start


def _stack(records: list[dict[str, Fields]]) -> _Chunk:
    def stacked(kind: str, field: str) -> Tensor:
        arrays = [torch.from_numpy(record[kind][field]) for record in records]
        same = len({array.dtype for array in arrays}) == 1  # float32 unless a record needs float64
        return torch.stack(arrays if same else [array.double() for array in arrays])

    lengths = [record["zs"]["attn_map"].shape[2] for record in records]
    maps = {}
    for kind in _SETTINGS:
        found = [torch.from_numpy(record[kind]["attn_map"]) for record in records]
        dtype = torch.float64 if any(m.dtype == torch.float64 for m in found) else torch.float32
        filled = torch.zeros(len(records), *found[0].shape[:2], max(lengths), dtype=dtype)
        for row, one, length in zip(filled, found, lengths, strict=True):
            row[..., :length] = one
        maps[kind] = filled
    return _Chunk(
        attn_out={kind: stacked(kind, "self_attn_out_hiddens") for kind in _SETTINGS},
        attn_map=maps,
        lengths=torch.tensor(lengths),
        context=stacked("icl", "attn_map_ctx"),
        attn_q=stacked("ftzs", "attn_q"),
    )
