"""The piece ``patch``: one weight patch for all queries, fitted on the held-out rows and tested on the queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metaopt_lens._errors import MetaoptLensError
from metaopt_lens.analysis import StaticAnswers, static_curve, static_table
from metaopt_lens.experiments._first_tokens import told_apart
from metaopt_lens.experiments._prompt_set import PromptSet
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._stages import Save, read_json, write_json
from metaopt_lens.models import LensModel

if TYPE_CHECKING:
    import pandas as pd


def patch(config: RunConfig, model: LensModel, prompts: PromptSet) -> Save:
    """Answers to the queries with static patches of the held-out rows (see `static_curve`), or why there are none."""
    asked = told_apart(model, prompts.prompts)
    known = {prompt.query for prompt in asked}
    first = prompts.prompts[0]
    inputs = dict.fromkeys(demo.input for demo in prompts.held_out if demo.input not in known)
    fitted = [dataclasses.replace(first, query=text, label=None) for text in inputs]
    notes: list[str] = []
    found = None
    try:
        found = static_curve(model, fitted, asked, prepend_bos=config.prepend_bos)
    except MetaoptLensError as error:
        notes.append(f"the patch for all queries is left out ({error})")
    body = {"fitted": len(fitted), "queries": len(asked), "notes": notes}
    if found is not None:
        body |= StaticAnswers.of(found).to_dict()
    return lambda folder: write_json(folder / "patch.json", body)


def load_patch(folder: Path) -> StaticAnswers | None:
    """Read a piece ``patch``; None if there is none."""
    body = read_json(folder / "patch.json")
    return StaticAnswers.from_dict(body) if "settings" in body else None


def patch_notes(folder: Path) -> list[str]:
    """Why there is no patch, if so."""
    notes: list[str] = read_json(folder / "patch.json")["notes"]
    return notes


def patch_table(found: Sequence[StaticAnswers]) -> dict[str, pd.DataFrame]:
    """``patch``: a row per setting; the patches that every demonstration set has."""
    if not found:
        return {}
    shared = [name for name in found[0].settings if all(name in one.settings for one in found)]
    return {"patch": static_table([one.only(shared) for one in found])}
