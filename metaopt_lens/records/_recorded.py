"""Records put together: all demonstrations of a recording, and some of its queries in every setting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaopt_lens._errors import FileFormatError
from metaopt_lens._json_lines import Fields, Line
from metaopt_lens.records._record_files import QUERY_SETTINGS, Recording

_DEMO_BLOCK = 4  # demonstrations parsed ahead


@dataclass(frozen=True)
class Sizes:
    """Sizes that all records of a recording share."""

    n_layers: int
    n_heads: int
    hidden: int
    context_len: int


@dataclass(frozen=True)
class RecordedDemos:
    """Query vectors of the demonstrations' tokens in the finetuning pass, start tokens left out."""

    attn_q: Float[Tensor, "src layer d_model"]
    lengths: Int[Tensor, " demo"]
    n_unused: int


@dataclass(frozen=True)
class RecordedQueries:
    """Some queries in the settings ``zs``, ``icl`` and ``ftzs``; attention maps are filled up with zeros."""

    attn_out: dict[str, Float[Tensor, "query layer d_model"]]
    attn_map: dict[str, Float[Tensor, "query layer head pos"]]
    lengths: Int[Tensor, " query"]
    context: Float[Tensor, "query layer src"]
    attn_q: Float[Tensor, "query layer d_model"]
    gold: Int[Tensor, " query"]
    predicted: dict[str, Int[Tensor, " query"]]

    def correct(self, setting: str) -> Bool[Tensor, " query"]:
        """Which queries were answered right."""
        return self.predicted[setting] == self.gold


def read_sizes(recording: Recording) -> Sizes:
    """The sizes of the first in-context record, which all others must have."""
    ((first,),) = recording.read([recording.lines["icl"][:1]])
    n_layers, n_heads, _ = first["attn_map"].shape
    return Sizes(n_layers, n_heads, first["self_attn_out_hiddens"].shape[1], first["attn_map_ctx"].shape[1])


def read_recorded_demos(recording: Recording, sizes: Sizes) -> RecordedDemos:
    """The demonstrations that the context holds, without their start tokens.

    Prompts drop demonstrations beyond the window, finetuning does not: those are left out.

    Raises:
        FileFormatError: a damaged record, sizes that disagree, demonstrations that do not fill the context.
    """
    lines = recording.lines["ft"]
    blocks = [lines[i : i + _DEMO_BLOCK] for i in range(0, len(lines), _DEMO_BLOCK)]
    parsed = zip(lines, (fields for block in recording.read(blocks) for fields in block), strict=True)
    joined = torch.empty(max(0, sizes.context_len - 1), sizes.n_layers, sizes.hidden)
    lengths: list[int] = []
    end = 1
    while end < sizes.context_len and (found := next(parsed, None)) is not None:
        line, array = found[0], found[1]["attn_q"]
        _check_sizes(line, "attn_q", array.shape, (sizes.n_layers, array.shape[1], sizes.hidden))
        if array.shape[1] < 2:
            raise FileFormatError(
                f"{line} holds a single token: a demonstration needs its start token and at least one more. "
                "Delete it from the recording."
            )
        start = sum(lengths)
        lengths.append(array.shape[1] - 1)
        end += lengths[-1] + 1
        if end <= sizes.context_len:
            if array.dtype == np.float64 and joined.dtype == torch.float32:
                joined = joined.double()
            joined[start : start + lengths[-1]] = torch.from_numpy(array)[:, 1:].transpose(0, 1)
    if end != sizes.context_len or not lengths:
        raise FileFormatError(
            f"{recording.lines['icl'][0]} has a context of {sizes.context_len} tokens, which no number of the "
            f"{len(lines)} demonstrations in ft fills: {len(lengths)} of them make {end} (a start token, then "
            "each demonstration and one separator). Record icl and ft with the same demonstrations."
        )
    return RecordedDemos(joined[: sum(lengths)], torch.tensor(lengths), len(lines) - len(lengths))


def read_recorded_queries(recording: Recording, sizes: Sizes, *, at_most: int) -> Iterator[RecordedQueries]:
    """All queries, in nearly equal parts of `at_most`, none of a single query unless there is only one.

    Raises:
        FileFormatError: a damaged record; settings whose sizes or gold labels disagree.
    """
    n = recording.n_queries
    n_parts = -(-n // at_most)
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    parts = [range(start, end) for start, end in pairwise(bounds)]
    blocks = [[recording.lines[kind][i] for i in part for kind in QUERY_SETTINGS] for part in parts]
    for block, found in zip(blocks, recording.read(blocks), strict=True):
        queries = [dict(zip(QUERY_SETTINGS, found[i : i + 3], strict=True)) for i in range(0, len(found), 3)]
        for i, query in enumerate(queries):
            _check_query(block[3 * i : 3 * i + 3], query, sizes)
        yield _stacked(queries)


def _check_query(lines: Sequence[Line], query: dict[str, Fields], sizes: Sizes) -> None:
    zs = query["zs"]
    needed = {
        "self_attn_out_hiddens": (sizes.n_layers, sizes.hidden),
        "attn_map": (sizes.n_layers, sizes.n_heads, zs["attn_map"].shape[2]),
        "attn_q": (sizes.n_layers, sizes.hidden),
        "attn_map_ctx": (sizes.n_layers, sizes.context_len),
    }
    for line, fields in zip(lines, query.values(), strict=True):
        for name in line.layout.arrays:
            _check_sizes(line, name, fields[name].shape, needed[name])
        if fields["gold_label"] != zs["gold_label"]:
            raise FileFormatError(
                f"{line} has gold label {fields['gold_label']}, but zs has {zs['gold_label']} there: "
                "the settings must hold the same queries in the same order."
            )


def _check_sizes(line: Line, field: str, came: Iterable[int], needed: Iterable[int]) -> None:
    if tuple(came) != tuple(needed):
        raise FileFormatError(
            f"{line} has '{field}' of sizes {tuple(came)}, but the other records need {tuple(needed)}: "
            "layers, heads, widths, query tokens and context must agree. Record all settings with one model "
            "and one set of queries and demonstrations."
        )


def _stacked(queries: Sequence[dict[str, Fields]]) -> RecordedQueries:
    lengths = [query["zs"]["attn_map"].shape[2] for query in queries]

    def arrays(kind: str, field: str) -> Float[Tensor, "query ..."]:
        """A field of every query, in float32 unless a record needs float64; filled with zeros to one length."""
        found = [torch.from_numpy(query[kind][field]) for query in queries]
        longest = max(t.shape[-1] for t in found)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in found) else torch.float32
        filled = torch.zeros(len(found), *found[0].shape[:-1], longest, dtype=dtype)
        for row, tensor in zip(filled, found, strict=True):
            row[..., : tensor.shape[-1]] = tensor
        return filled

    def labels(kind: str, field: str) -> Int[Tensor, " query"]:
        return torch.tensor([query[kind][field] for query in queries])

    return RecordedQueries(
        attn_out={kind: arrays(kind, "self_attn_out_hiddens") for kind in QUERY_SETTINGS},
        attn_map={kind: arrays(kind, "attn_map") for kind in QUERY_SETTINGS},
        lengths=torch.tensor(lengths),
        context=arrays("icl", "attn_map_ctx"),
        attn_q=arrays("ftzs", "attn_q"),
        gold=labels("zs", "gold_label"),
        predicted={kind: labels(kind, "pred_label") for kind in QUERY_SETTINGS},
    )
