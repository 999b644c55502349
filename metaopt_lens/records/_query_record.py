"""Records as values, one at a time: read from the published layout and written in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens._json_lines import Fields
from metaopt_lens._storage import atomic_path
from metaopt_lens.records._record_files import FILE, open_recording

QuerySetting = Literal["zs", "icl", "ftzs"]


@dataclass(frozen=True)
class QueryRecord:
    """What one setting (zero-shot, in-context, finetuned) recorded for one query, at its last position.

    Attributes:
        attn_out: output of each self-attention block, after its output projection.
        attn_map: attention scores before the softmax to the query's own tokens (start token not counted).
        gold_label, pred_label: true and predicted class.
        attn_map_ctx: in context only: the scores summed over the heads, to the context ``start token,
            demonstration, separator, demonstration, separator, ...``.
        attn_q: finetuned only: attention query vector, all heads side by side.
    """

    attn_out: Float[Tensor, "layer d_model"]
    attn_map: Float[Tensor, "layer head pos"]
    gold_label: int
    pred_label: int
    attn_map_ctx: Float[Tensor, "layer src"] | None = None
    attn_q: Float[Tensor, "layer d_model"] | None = None


@dataclass(frozen=True)
class DemoRecord:
    """Attention query vectors of one demonstration's tokens (start token first) in the finetuning pass."""

    attn_q: Float[Tensor, "layer src d_model"]


def read_queries(directory: str | os.PathLike[str], setting: QuerySetting) -> Iterator[QueryRecord]:
    """The records of one query setting, one at a time.

    Args:
        directory: folder of the recording.
        setting: ``zs``, ``icl`` or ``ftzs``.
    """
    recording = open_recording(directory)
    lines = recording.lines[setting]
    for line, (fields,) in zip(lines, recording.read([line] for line in lines), strict=True):
        arrays = {name: torch.from_numpy(fields[name]) for name in line.layout.arrays}
        n_layers = {len(tensor) for tensor in arrays.values()}
        if len(n_layers) > 1:
            raise FileFormatError(f"{line} has different numbers of layers: {sorted(n_layers)}.")
        yield QueryRecord(
            attn_out=arrays["self_attn_out_hiddens"],
            attn_map=arrays["attn_map"],
            gold_label=fields["gold_label"],
            pred_label=fields["pred_label"],
            attn_map_ctx=arrays.get("attn_map_ctx"),
            attn_q=arrays.get("attn_q"),
        )


def read_demos(directory: str | os.PathLike[str]) -> Iterator[DemoRecord]:
    """The records of the finetuning pass, one demonstration at a time.

    Args:
        directory: folder of the recording.
    """
    recording = open_recording(directory)
    for (fields,) in recording.read([line] for line in recording.lines["ft"]):
        yield DemoRecord(torch.from_numpy(fields["attn_q"]))


def write_records(
    directory: str | os.PathLike[str],
    *,
    zs: Iterable[QueryRecord],
    icl: Iterable[QueryRecord],
    ftzs: Iterable[QueryRecord],
    ft: Iterable[DemoRecord],
) -> Path:
    """Write a recording in the published layout, numbers as their float64 text; returns the folder.

    Args:
        directory: the folder.
        zs: the queries zero-shot.
        icl: in context, with `attn_map_ctx`.
        ftzs: finetuned, with `attn_q`.
        ft: the demonstrations in the finetuning pass.

    Raises:
        OptionError: a record lacks what its setting needs.
    """
    root = Path(directory)
    for kind, records in (("zs", zs), ("icl", icl), ("ftzs", ftzs)):
        _write(root / kind / FILE, (_query_fields(record, kind) for record in records))
    _write(root / "ft" / FILE, ({"attn_q": _numbers(record.attn_q)} for record in ft))
    return root


def _query_fields(record: QueryRecord, kind: str) -> Fields:
    context = record.attn_map_ctx
    if context is None:
        if kind == "icl":
            raise OptionError("records of the setting icl need attn_map_ctx, the scores to the context; got None.")
        context = torch.zeros(len(record.attn_out), 1)  # a column that readers expect and no metric reads
    fields: Fields = {
        "self_attn_out_hiddens": _numbers(record.attn_out),
        "attn_map": _numbers(record.attn_map),
        "attn_map_ctx": _numbers(context),
        "gold_label": record.gold_label,
        "pred_label": record.pred_label,
    }
    if kind == "ftzs":
        if record.attn_q is None:
            raise OptionError("records of the setting ftzs need attn_q, the attention query vectors; got None.")
        fields["attn_q"] = _numbers(record.attn_q)
    return fields


def _numbers(tensor: Tensor) -> Any:
    return tensor.detach().cpu().double().contiguous().numpy()


def _write(path: Path, records: Iterable[Fields]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for fields in records:
            file.write(orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
