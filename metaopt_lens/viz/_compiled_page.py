"""A context compiled into weights: terminal tables, plain data, and one HTML page that needs no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from rich.console import RenderableType
from torch import Tensor

from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens.analysis import PatchesAgainstFinetuning, scope
from metaopt_lens.experiments import CompiledPrompt
from metaopt_lens.viz._comparison_text import frame_text
from metaopt_lens.viz._page import model_name
from metaopt_lens.viz._render import Measured, render, words
from metaopt_lens.viz._segments import segments, visible_token

_DEMO_ROWS = 12


def compiled_texts(found: CompiledPrompt) -> list[RenderableType]:
    """Terminal tables: answers, matrices, demonstrations, and the patch for all queries where there is one.

    Args:
        found: what `compile_prompts` returned.
    """
    tables: list[RenderableType] = [
        frame_text(_answers(found), "The most probable next tokens"),
        frame_text(_written(_by_matrix(found)), "Changes, mean over layers and tokens"),
    ]
    if found.shares is not None:
        tables.append(frame_text(_written(_demos(found).head(_DEMO_ROWS)), "What it comes from"))
    if found.static is not None:
        title = "One patch for all queries, on queries it was not fitted on (95 % intervals)"
        tables.append(frame_text(_written(_static_table(found)), title))
        tables.append(found.static.sentence)
    if found.against is not None:
        title = "Cosine of that patch's changes and finetuned ones, mean over layers (95 % intervals)"
        tables.append(frame_text(_written(_cosines(found.against)), title))
        title = "What each buys on the held-out queries (95 % intervals)"
        tables.append(frame_text(_written(_accuracies(found.against)), title))
        tables.append(found.against.sentence)
    return tables


def compiled_data(found: CompiledPrompt) -> dict[str, Any]:
    """Everything as plain data.

    Args:
        found: what `compile_prompts` returned.
    """
    patch = found.patch
    data: dict[str, Any] = {
        "model": patch.model.name,
        "prompt": list(patch.tokens.tokens),
        "precision": patch.precision,
        "matrices": list(patch.matrices),
        "logits_off_patched": found.off[0],
        "logits_off_zero_shot": found.off[1],
        "largest_logit": found.largest,
        "answers": {name: [[t.text, t.probability] for t in tops] for name, tops in found.top.items()},
        "norms": _records(found.norms()),
        "demonstrations": _records(_demos(found)) if found.shares is not None else None,
        "norm_scale_fixed": None if found.shares is None else found.shares.norm_scale_fixed,
        "smallest_normalised_coordinate": None if patch.smallest is None else float(patch.smallest.min()),
        "static": None,
        "finetuning": None,
        "notes": list(found.notes),
    }
    if found.static is not None:
        ranks = {name: values.tolist() for name, values in found.static.sets[0].effective_rank.items()}
        data["static"] = {
            "table": _records(found.static.to_frame()),
            "sentence": found.static.sentence,
            "effective_rank": ranks,
        }
    if (against := found.against) is not None:
        data["finetuning"] = {
            "finetuned": repr(against.sets[0].finetuned),
            "cosines": _records(against.to_frame()),
            "cosines_by_layer": [_records(one.to_frame()) for one in against.sets],
            "accuracies": _records(against.accuracy_frame()),
            "sentence": against.sentence,
        }
    return data


def write_compiled_page(found: CompiledPrompt, path: str | os.PathLike[str]) -> Path:
    """Write a self-contained page: the prompt struck out, answers, maps of norms and shares, the patch for all queries.

    Args:
        found: what `compile_prompts` returned.
        path: the file to write.

    Returns:
        The path.
    """
    tokens, shares = found.patch.tokens, found.demo_shares()
    frame = found.norms()
    ranks = None
    if found.static is not None:
        ranks = _map(found.static.sets[0].effective_rank, "matrix", "effective rank")
    html = render(
        "compiled.html.j2",
        heading=f"The context as weights of {model_name(found.patch.model)}",
        sentence=found.sentence,
        pieces=[
            (segment.kind, segment.colour, segment.name, "".join(tokens.tokens[segment.span.slice]).strip("\n"))
            for segment in segments(tokens)
        ],
        answers=_answers(found),
        maps=[
            (_matrix_map(frame, column), caption)
            for column, caption in (
                ("norm", "Frobenius norm of the change, mean over the query's tokens."),
                ("relative", "The same, relative to the norm of the matrix."),
            )
            if column in frame
        ],
        shares=None if shares is None else _demo_map(shares),
        fixed=found.shares is not None and found.shares.norm_scale_fixed,
        demos=None if found.shares is None else _demos(found),
        static=None if found.static is None else _static_table(found),
        static_sentence=None if found.static is None else found.static.sentence,
        scope="" if found.static is None else scope(len(found.static.sets)),
        ranks=ranks,
        **_against(found.against),
        smallest=None if found.patch.smallest is None else f"{float(found.patch.smallest.min()):.2g}",
        notes=found.notes,
        provenance={"weights": found.patch.model.weights, **found.patch.provenance},
    )
    return write_text(path, html)


def write_compiled_outputs(found: CompiledPrompt, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write ``compiled.csv``, ``compiled.json`` and ``compiled.html``, and the patch itself; returns their paths.

    Args:
        found: what `compile_prompts` returned.
        folder: where the files are written.
    """
    base = Path(folder)
    with atomic_path(base / "compiled.csv") as temporary:
        found.patch.to_frame().to_csv(temporary, index=False)
    text = json.dumps(compiled_data(found), indent=1, ensure_ascii=False)
    return {
        "table": base / "compiled.csv",
        "data": write_text(base / "compiled.json", text + "\n"),
        "page": write_compiled_page(found, base / "compiled.html"),
        "patch": found.patch.save(base / "patch"),
    }


def _answers(found: CompiledPrompt) -> pd.DataFrame:
    columns = {
        name: [f"{visible_token(token.text)} {token.probability:.1%}" for token in tops]
        for name, tops in found.top.items()
    }
    return pd.DataFrame(columns)


def _by_matrix(found: CompiledPrompt) -> pd.DataFrame:
    frame = found.norms().drop(columns="layer")
    return frame.groupby("matrix", sort=False).mean().reset_index()


def _demos(found: CompiledPrompt) -> pd.DataFrame:
    shares = found.demo_shares()
    assert shares is not None
    tokens = found.patch.tokens
    texts = ["".join(tokens.tokens[span.slice]).strip() for span in tokens.demos]
    return pd.DataFrame({"demonstration": texts, "share": shares.mean(0).tolist()})


def _static_table(found: CompiledPrompt) -> pd.DataFrame:
    assert found.static is not None
    curves = found.static
    frame = curves.to_frame() if len(curves.sets) > 1 else curves.sets[0].to_frame()  # exact accuracies of one set
    columns: dict[str, Any] = {"setting": frame["setting"], "queries": frame["n"]}
    for name in ("accuracy", "gain", "kl_to_in_context", "kl_to_zero_shot"):
        if name in frame:
            columns[name] = _measured(frame, name)
    return pd.DataFrame(columns)


def _against(found: PatchesAgainstFinetuning | None) -> dict[str, Any]:
    """What the page says of the comparison with finetuning."""
    if found is None:
        return {"against": None}
    grid = dict(zip(found.sets[0].matrices, found.cosines["finetuned"].mean(0).unbind(-1), strict=True))
    return {
        "against": found.sentence,
        "finetuned": repr(found.sets[0].finetuned),
        "cosine_map": _map(grid, "matrix", "cosine", signed=True),
        "cosines": _cosines(found),
        "accuracies": _accuracies(found),
    }


def _cosines(found: PatchesAgainstFinetuning) -> pd.DataFrame:
    """By update, and null, and matrix: mean over layers and draws, and the excess of all matrices over each null."""
    frame = found.to_frame()
    frame = frame.assign(cosine=pd.Series(_measured(frame, "cosine")))
    table = frame.pivot_table(index="update", columns="matrix", values="cosine", sort=False, aggfunc="first")
    whole = frame[frame["matrix"] == "all"].set_index("update")
    table["finetuned exceeds it by"] = pd.Series(_measured(whole, "excess"), index=whole.index)
    return table.reset_index()


def _accuracies(found: PatchesAgainstFinetuning) -> pd.DataFrame:
    if len(found.sets) == 1:  # exact intervals
        frame = found.sets[0].accuracy_frame()
        columns = {name: frame[name] for name in ("setting", "draw")} | {"queries": frame["n"]}
        return pd.DataFrame({**columns, "accuracy": _measured(frame, "accuracy")})
    frame = found.accuracy_frame()
    both = {name: _measured(frame, name) for name in ("accuracy", "gain")}
    return pd.DataFrame({"setting": frame["setting"], "queries": frame["n"], **both})


def _measured(frame: pd.DataFrame, name: str) -> list[Measured]:
    """A column with its interval."""
    parts = (frame[name], frame[f"{name}_low"], frame[f"{name}_high"])
    return [Measured(*map(float, row)) for row in zip(*parts, strict=True)]


def _written(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, with their intervals."""

    def text(value: Any) -> Any:
        if isinstance(value, Measured):
            if value.value != value.value:
                return ""
            interval = "" if pd.isna(value.low) else f" ({value.low:.2f} to {value.high:.2f})"
            return f"{value.value:.2f}{interval}"
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.3f}"
        return value

    return pd.DataFrame({words(name): [text(value) for value in frame[name]] for name in frame.columns})


def _matrix_map(frame: pd.DataFrame, column: str) -> go.Figure:
    grid = frame.pivot_table(index="layer", columns="matrix", values=column, sort=False)
    return _map({str(name): torch.tensor(grid[name].to_numpy()) for name in grid.columns}, "matrix", column)


def _demo_map(shares: Tensor) -> go.Figure:
    columns = {f"{i + 1}": column for i, column in enumerate(shares.T)}
    return _map(columns, "demonstration", "share", signed=True)


def _map(columns: dict[str, Tensor], across: str, what: str, *, signed: bool = False) -> go.Figure:
    """A map of layers against anything."""
    cells = [[float(v) for v in row] for row in torch.stack([c.double().cpu() for c in columns.values()], dim=1)]
    bound = max((abs(v) for row in cells for v in row), default=0.0) or 1.0
    colours = {"colorscale": "RdBu", "zmin": -bound, "zmax": bound} if signed else {"colorscale": "Blues", "zmin": 0}
    heat = go.Heatmap(
        z=cells,
        x=list(columns),
        y=list(range(len(cells))),
        hovertemplate=f"layer %{{y}}, {across} %{{x}}<br>{what} %{{z:.4g}}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar={"thickness": 10, "outlinewidth": 0},
        **colours,
    )
    figure = go.Figure(heat)
    figure.update_layout(
        title=what,
        height=min(max(150 + 18 * len(cells), 240), 720),
        margin={"l": 44, "r": 10, "t": 42, "b": 40},
        paper_bgcolor="white",
    )
    figure.update_xaxes(title=across, type="category")
    figure.update_yaxes(title="layer", autorange="reversed")
    return figure


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data; what is undefined is None."""
    return [{str(k): None if pd.isna(v) else v for k, v in row.items()} for row in frame.to_dict("records")]
