"""The table of heads as the pictures, the page and the command line show it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from metaopt_lens._errors import OptionError
from metaopt_lens.decomposition import Decomposition, DecompositionSet

ID_COLUMNS = ("query", "position", "token", "layer", "head", "name")


@dataclass(frozen=True)
class Measure:
    """A column of the table: its title, and what it says in one line."""

    title: str
    meaning: str


MEASURES: dict[str, Measure] = {
    "mass": Measure("mass", "attention probability on the demonstrations"),
    "meta_gradient_residual_norm": Measure(
        "|meta-gradient W_O|", "norm of the meta-gradient in the residual stream: the order of heads"
    ),
    "meta_gradient_share": Measure(
        "meta-gradient share",
        "norm of the meta-gradient relative to the head's output (above 1 where the parts cancel)",
    ),
    "fidelity": Measure("fidelity", "cosine between the linear relaxation and the head's exact output"),
    "total_effect_norm": Measure("total effect", "norm of z minus z of the zero-shot run"),
    "direct_effect_norm": Measure("direct effect", "attending to the demonstrations here and now"),
    "indirect_effect_norm": Measure(
        "indirect effect", "queries, keys and values changed by what earlier layers read from the demonstrations"
    ),
    "position_effect_norm": Measure("position effect", "the query standing further back"),
    "indirect_and_position_norm": Measure(
        "indirect and position effect", "everything but the direct effect, taken together"
    ),
    "z_norm": Measure("|z|", "norm of the head's output"),
    "zero_shot_norm": Measure("|zero-shot|", "norm of the part read from everything but the demonstrations"),
    "meta_gradient_norm": Measure("|meta-gradient|", "norm of the part read from the demonstrations"),
    "update_norm": Measure("|update|", "norm of z minus z with the demonstrations masked out"),
    "linear_zero_shot_norm": Measure("|W_ZSL q|", "norm of the relaxed zero-shot part"),
    "linear_meta_gradient_norm": Measure("|dW_ICL q|", "norm of the relaxed meta-gradient part"),
}


def head_table(result: Decomposition | DecompositionSet) -> pd.DataFrame:
    """`to_frame()` with one more column: `meta_gradient_share`, the meta-gradient's norm over that of the output.

    Args:
        result: what `decompose` returned.
    """
    decompositions(result)  # refuses an empty set
    frame = result.to_frame()
    z_norm = frame["z_norm"].clip(lower=float(np.finfo(np.float32).tiny))
    frame["meta_gradient_share"] = frame["meta_gradient_norm"] / z_norm
    return frame


def head_means(result: Decomposition | DecompositionSet) -> pd.DataFrame:
    """One row per head: every numeric column averaged over the prompts and positions of the result.

    Args:
        result: what `decompose` returned.
    """
    frame = head_table(result)
    return frame.groupby(["layer", "head", "name"], as_index=False, sort=True)[measures(frame)].mean()


def head_grid(result: Decomposition | DecompositionSet, value: str) -> pd.DataFrame:
    """Layer x head table of one numeric column, averaged as in `head_means`.

    Raises:
        OptionError: the table has no such column.
    """
    means = head_means(result)
    known = measures(means)
    if value not in known:
        raise OptionError(f"there is no value {value!r} to draw: choose one of {', '.join(known)}.")
    return means.pivot(index="layer", columns="head", values=value)


def measures(frame: pd.DataFrame) -> list[str]:
    """The numeric columns that describe heads: those of `MEASURES` first, in its order."""
    found = [c for c in frame.columns if c not in ID_COLUMNS and pd.api.types.is_numeric_dtype(frame[c])]
    return [c for c in MEASURES if c in found] + [c for c in found if c not in MEASURES]


def measure(column: str) -> Measure:
    """Title and meaning of a column; a column unknown here is called by its name."""
    return MEASURES.get(column, Measure(column.replace("_", " "), ""))


def decompositions(result: Decomposition | DecompositionSet) -> list[Decomposition]:
    """The decompositions of a result, one or many.

    Args:
        result: what `decompose` returned.

    Raises:
        OptionError: an empty set.
    """
    items = [result] if isinstance(result, Decomposition) else list(result)
    if not items:
        raise OptionError("the set of decompositions is empty: there is nothing to show.")
    return items


def n_averaged(result: Decomposition | DecompositionSet) -> int:
    """How many (prompt, position) pairs `head_means` averages."""
    return sum(len(item.positions) for item in decompositions(result))


def number(value: float) -> str:
    """Three decimals, fewer for large numbers, with a real minus sign."""
    text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.1f}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """Two decimals with a real sign; none where they are all 0."""
    size = f"{abs(value):.2f}"
    return size if float(size) == 0 else ("−" if value < 0 else "+") + size
