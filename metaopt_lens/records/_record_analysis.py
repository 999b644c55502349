"""What `analyze_records` gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis import Convention, Interval, QueryStatistic, Rec2FTP

if TYPE_CHECKING:
    import pandas as pd

_BY_SUBSET = {"dai2022": ("SimAOU", "SimAM", "ZSL SimAM"), "deutch2024": ("SimAOU", "ICL-FTZS SimAM")}
_TRAINING = tuple(f"{level}-level {what}" for level in ("example", "token") for what in ("kendall", "recall_topk"))


@dataclass(frozen=True)
class LayerMetric:
    """One metric, per query and layer.

    Attributes:
        name: as the published result files call it.
        per_query: the numbers; None if the metric is undefined on the whole recording.
        undefined: why, if so.
        null: what chance gives at each layer, where that is known.
        interval: of the mean over all queries; None where a layer has no value.
        strict: an undefined query makes the layer's mean undefined (as in the published programs) instead of
            being left out.
    """

    name: str
    per_query: QueryStatistic | None
    undefined: str | None = None
    null: tuple[float, ...] | None = None
    interval: Interval | None = None
    strict: bool = False

    def layers(self, queries: Bool[Tensor, " query"] | None = None) -> list[float | None]:
        """Mean over the queries (or some of them) at each layer; None where undefined.

        Args:
            queries: which queries to average over; None for all.
        """
        if self.per_query is None:
            return []
        statistic = self.per_query if queries is None else self.per_query.select(queries)
        defined = statistic.n_defined
        enough = defined == len(statistic.values) if self.strict else defined > 0
        enough = enough & (defined > 0)
        means = statistic.values.nanmean(0)
        return [float(mean) if ok else None for mean, ok in zip(means, enough, strict=True)]

    def why_undefined(self, queries: Bool[Tensor, " query"] | None = None) -> str | None:
        """Why a layer has no value on these queries; None if all have one.

        Args:
            queries: which queries count; None for all.
        """
        if self.per_query is None:
            return self.undefined
        if queries is not None and not bool(queries.any()):
            return "no query is wrong zero-shot and right both finetuned and in context"
        return self.per_query.undefined_because if None in self.layers(queries) else None

    def require(self) -> list[float]:
        """The mean at each layer over all queries, or `UndefinedMetricError`."""
        reason = self.why_undefined()
        if reason is not None:
            raise UndefinedMetricError(f"{self.name} is undefined on this recording: {reason}.")
        return [value for value in self.layers() if value is not None]


@dataclass(frozen=True)
class RecordShapes:
    """Sizes of a recording."""

    n_queries: int
    n_layers: int
    n_heads: int
    hidden: int
    n_demonstrations: int
    retained_demo_tokens: int
    context_len: int
    max_query_len: int


@dataclass(frozen=True)
class RecordAnalysis:
    """All metrics of one recording.

    Attributes:
        convention: what the metrics did where their definitions leave a choice.
        shapes: sizes of the recording.
        rec2ftp: the prediction recall with its counts and base rate.
        f2t: queries wrong zero-shot and right both finetuned and in context (the subset ``f2t``).
        metrics: every per-layer metric by its name.
        notes: what about the recording or the choices a reader must know.
    """

    convention: Convention
    shapes: RecordShapes
    rec2ftp: Rec2FTP
    f2t: Bool[Tensor, " query"]
    metrics: dict[str, LayerMetric]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None (undefined, with the reason under ``undefined``).

        The blocks ``dai2022`` and ``deutch2024`` have the keys of the published result files.
        """
        undefined: dict[str, str] = {}
        blocks: dict[str, Any] = {"dai2022": self._predictions(undefined), "deutch2024": {}}
        for block, names in _BY_SUBSET.items():
            for subset in ("all", "f2t"):
                blocks[block][subset] = self._block(names, subset, f"{block}.{subset}", undefined)
        where = "dai2022.training_attention"
        blocks["dai2022"]["training_attention"] = self._block(_TRAINING, "all", where, undefined)
        return {
            "convention": self.convention.name,
            "shapes": asdict(self.shapes),
            **blocks,
            "supplementary": self._supplementary(undefined),
            "undefined": undefined,
            "notes": list(self.notes),
        }

    def to_frame(self) -> pd.DataFrame:
        """Tidy table: one row per metric, subset of the queries and layer."""
        import pandas as pd

        rows = []
        for metric in self.metrics.values():
            subsets = {"all": None} if metric.name in _TRAINING else {"all": None, "f2t": self.f2t}
            for subset, queries in subsets.items():
                for layer, value in enumerate(metric.layers(queries)):
                    assert metric.per_query is not None  # it has layers
                    defined = metric.per_query.defined[:, layer]
                    interval = metric.interval if subset == "all" else None
                    rows.append(
                        {
                            "metric": metric.name,
                            "subset": subset,
                            "layer": layer,
                            "value": value,
                            "n_queries": int((defined if queries is None else defined[queries]).sum()),
                            "null": metric.null[layer] if metric.null and subset == "all" else None,
                            "low": float(interval.low[layer]) if interval else None,
                            "high": float(interval.high[layer]) if interval else None,
                        }
                    )
        columns = ["metric", "subset", "layer", "value", "n_queries", "null", "low", "high"]
        return pd.DataFrame(rows, columns=columns).astype({"value": float, "null": float, "low": float, "high": float})

    def _predictions(self, undefined: dict[str, str]) -> dict[str, Any]:
        if self.rec2ftp.undefined is not None:
            undefined["dai2022.Recall2FTP"] = self.rec2ftp.undefined
        counts = {"both": self.rec2ftp.both, "icl": self.rec2ftp.icl, "ftzs": self.rec2ftp.ft}
        return {"f2t_counts": counts, "Recall2FTP": self.rec2ftp.value}

    def _block(self, names: Sequence[str], subset: str, where: str, undefined: dict[str, str]) -> dict[str, Any]:
        queries = self.f2t if subset == "f2t" else None
        block: dict[str, Any] = {}
        for name in names:
            reason = self.metrics[name].why_undefined(queries)
            if reason is not None:
                undefined[f"{where}.{name}"] = reason
            block[name] = self.metrics[name].layers(queries) or None
        return {**block, "overall": {name: _overall(block[name]) for name in names}}

    def _supplementary(self, undefined: dict[str, str]) -> dict[str, Any]:
        """What the published files lack and no reading can do without: base rate, nulls, intervals."""
        if self.rec2ftp.base_rate is None:
            undefined["supplementary.base_rate"] = "no query is wrong zero-shot"
        published = {name for names in _BY_SUBSET.values() for name in names} | set(_TRAINING)
        others = [name for name in self.metrics if name not in published]
        return {
            "base_rate": self.rec2ftp.base_rate,
            "zs_wrong": self.rec2ftp.zs_wrong,
            "Recall2FTP interval": self.rec2ftp.interval(),
            "all": self._block(others, "all", "supplementary.all", undefined),
            "f2t": self._block(others, "f2t", "supplementary.f2t", undefined),
            "null": {name: list(m.null) for name, m in self.metrics.items() if m.null is not None},
            "interval": {
                name: {
                    "low": m.interval.low.tolist(),
                    "high": m.interval.high.tolist(),
                    "level": m.interval.level,
                    "label": m.interval.label,
                }
                for name, m in self.metrics.items()
                if m.interval is not None
            },
        }


def _overall(layers: Sequence[float | None] | None) -> float | None:
    values = [value for value in layers or () if value is not None]
    if layers is None or len(values) < len(layers):
        return None
    return float(torch.tensor(values, dtype=torch.float64).mean())
