"""The piece ``attribution``: what every head's meta-gradient does to the answers. A thin seam to `interventions`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metaopt_lens._errors import UndefinedMetricError, UnsupportedModelError
from metaopt_lens.analysis import mean_interval
from metaopt_lens.experiments._prompt_set import PromptSet
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._stages import Save, read_json, versions, write_json
from metaopt_lens.interventions import HeadEffects, Recovery, head_effects, rank_by_effect, recovery
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, tokenize_label
from metaopt_lens.runs import candidate_labels

if TYPE_CHECKING:
    import pandas as pd


def attribution(config: RunConfig, model: LensModel, prompts: PromptSet) -> Save:
    """Effects of all heads on the first queries (see `head_effects`), or a note why there are none."""
    chosen = prompts.prompts[: config.attribution_queries]
    notes: list[str] = []
    effects = None
    try:
        effects = head_effects(
            model,
            chosen,
            metric=_metric(config, model, chosen),
            prepend_bos=config.prepend_bos,
            batch_size=config.batch_size,
        )
    except UnsupportedModelError as error:
        notes.append(f"the attribution to heads is left out ({error})")

    def save(folder: Path) -> None:
        write_json(folder / "attribution.json", {"queries": len(chosen), "notes": notes})
        if effects is not None:
            dataclasses.replace(effects, provenance=versions()).save(folder / "effects")

    return save


def _metric(config: RunConfig, model: LensModel, prompts: Sequence[ICLPrompt]) -> str:
    """The logit difference cannot saturate, but needs label words with different first tokens."""
    if config.attribution_metric != "auto":
        return config.attribution_metric
    template = prompts[0].template
    for words in {candidate_labels(prompt) for prompt in prompts}:
        firsts = [tokenize_label(word, template, model.tokenizer)[0] for word in words]
        if len(firsts) < 2 or len(set(firsts)) < len(firsts):
            return "label_log_prob"
    return "logit_difference"


def load_attribution(folder: Path) -> HeadEffects | None:
    """Read a piece ``attribution``; None if the model's heads could not be knocked out."""
    return HeadEffects.load(folder / "effects") if (folder / "effects.json").is_file() else None


def attribution_notes(folder: Path) -> list[str]:
    """Why there are no effects, if so."""
    notes: list[str] = read_json(folder / "attribution.json")["notes"]
    return notes


def attribution_tables(found: Mapping[int, HeadEffects]) -> dict[str, pd.DataFrame]:
    """Tables of the effects of all seeds, each a demonstration set.

    ``attributions``: one row per head, ranked by exact effect; ``attribution_seeds``: how many heads recover 90 % of
    the gain on each set's held-out queries; ``attribution_recovery``: the same over all sets, one row per metric.
    """
    import pandas as pd

    if not found:
        return {}
    by_metric = {
        metric: [e for e in found.values() if e.metric == metric]
        for metric in dict.fromkeys(e.metric for e in found.values())
    }
    frames = [_heads(metric, effects) for metric, effects in by_metric.items()]
    return {
        "attributions": pd.concat(frames, ignore_index=True),
        "attribution_seeds": pd.DataFrame([_seed_row(seed, e) for seed, e in found.items()]),
        "attribution_recovery": pd.DataFrame([_recovery_row(metric, effects) for metric, effects in by_metric.items()]),
    }


def _heads(metric: str, effects: Sequence[HeadEffects]) -> pd.DataFrame:
    import pandas as pd

    sets = torch.cat([torch.full((len(e.in_context),), i) for i, e in enumerate(effects)])
    exact = mean_interval(torch.cat([e.exact for e in effects]).double(), sets=sets)
    estimate = torch.stack([e.first_order.double().mean(0) for e in effects]).mean(0)
    gain = torch.stack([e.gain.mean() for e in effects])
    rows = [
        {
            "rank": rank,
            "name": str(ref),
            "layer": ref.layer,
            "head": ref.head,
            "exact": float(exact.estimate[ref.layer, ref.head]),
            "low": float(exact.low[ref.layer, ref.head]),
            "high": float(exact.high[ref.layer, ref.head]),
            "first_order": float(estimate[ref.layer, ref.head]),
            "metric": metric,
        }
        for rank, ref in enumerate(rank_by_effect(exact.estimate, gain), start=1)
    ]
    return pd.DataFrame(rows)


def _seed_row(seed: int, effects: HeadEffects) -> dict[str, Any]:
    row: dict[str, Any] = {
        "seed": seed,
        "metric": effects.metric,
        "queries": len(effects.in_context),
        "in_context": float(effects.in_context.mean()),
        "zero_shot": float(effects.zero_shot.mean()),
        "gain": float(effects.gain.mean()),
    }
    try:
        found = effects.icl_heads()
        row |= _recovery(found.recovery) | {"heads": " ".join(map(str, found.heads))}
    except UndefinedMetricError as error:
        row |= _recovery(str(error)) | {"heads": ""}
    try:
        row["first_order_correlation"] = effects.correlation
    except UndefinedMetricError:
        row["first_order_correlation"] = float("nan")
    return row


def _recovery_row(metric: str, effects: Sequence[HeadEffects]) -> dict[str, Any]:
    """Demonstration sets are the unit where there are several: each set's heads are ranked on its own other queries."""
    try:
        if len(effects) == 1:
            found: Recovery | str = effects[0].recovery()
        else:
            usable = [e.added.mean(0) for e in effects if len(e.held_out)]
            curves = torch.stack(usable) if usable else effects[0].added
            found = recovery(curves, 0.9, "demonstration sets")
    except UndefinedMetricError as error:
        found = str(error)
    return {"metric": metric, "sets": len(effects), **_recovery(found)}


def _recovery(found: Recovery | str) -> dict[str, Any]:
    """Columns of a recovery, or of the reason why it is undefined."""
    if isinstance(found, str):
        undefined = float("nan")
        return {"heads_needed": undefined, "heads_low": undefined, "heads_high": undefined, "note": found}
    low, high = (float("nan") if end is None else float(end) for end in (found.low, found.high))
    return {"heads_needed": float(found.n_heads), "heads_low": low, "heads_high": high, "note": found.note}
