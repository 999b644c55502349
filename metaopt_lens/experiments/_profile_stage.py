"""The piece ``profile``: what several theories of in-context learning say about every head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from metaopt_lens._errors import MetaoptLensError
from metaopt_lens.analysis import Comparison, HeadProfile, head_profile, join_profiles
from metaopt_lens.experiments._first_tokens import told_apart
from metaopt_lens.experiments._prompt_set import PromptSet
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._stages import Save, read_json, versions, write_json
from metaopt_lens.models import LensModel

if TYPE_CHECKING:
    import pandas as pd


def profile(config: RunConfig, model: LensModel, prompts: PromptSet, comparison: Comparison, seed: int) -> Save:
    """Scores of all heads (see `head_profile`) but those that cost a run per head, or a note why there are none.

    The similarity to finetuning is among them if every query's answers can be told apart by their first token.
    """
    chosen = told_apart(model, prompts.prompts)
    notes: list[str] = []
    found = None
    try:
        found = head_profile(
            model,
            chosen,
            comparison=comparison if len(chosen) == len(prompts.prompts) else None,
            exact=False,
            function_vectors=False,
            prepend_bos=config.prepend_bos,
            seed=seed,
        )
    except MetaoptLensError as error:
        notes.append(f"the head profile is left out ({error})")

    def save(folder: Path) -> None:
        write_json(folder / "profile.json", {"queries": len(chosen), "notes": notes})
        if found is not None:
            dataclasses.replace(found, provenance=versions()).save(folder / "scores")

    return save


def load_profile(folder: Path) -> HeadProfile | None:
    """Read a piece ``profile``; None if there are no scores."""
    return HeadProfile.load(folder / "scores") if (folder / "scores.json").is_file() else None


def profile_notes(folder: Path) -> list[str]:
    """Why there are no scores, if so."""
    notes: list[str] = read_json(folder / "profile.json")["notes"]
    return notes


def profile_tables(found: Sequence[HeadProfile]) -> dict[str, pd.DataFrame]:
    """``profile``: a row per head; ``profile_correlations``: rank correlation of every two scores over the heads."""
    import pandas as pd

    if not found:
        return {}
    joined = join_profiles(found)
    rows = []
    for first, second in combinations(joined.scores, 2):
        rho = joined.rank_correlation(first, second)
        numbers = {"rho": float(rho.estimate), "low": max(-1.0, float(rho.low)), "high": min(1.0, float(rho.high))}
        rows.append({"first": first, "second": second, **numbers, "sets": rho.n_sets})
    return {"profile": joined.to_frame(), "profile_correlations": pd.DataFrame(rows)}
