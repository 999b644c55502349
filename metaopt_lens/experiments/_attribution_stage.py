"""The piece ``attribution``: what every head's meta-gradient does to the answers. A thin seam to `interventions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metaopt_lens._errors import UndefinedMetricError, UnsupportedModelError
from metaopt_lens.analysis import hierarchical_bootstrap
from metaopt_lens.experiments._prompt_set import PromptSet
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._stages import Save, read_json, untimed, write_json
from metaopt_lens.interventions import HeadEffects, head_effects
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, tokenize_label

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
            untimed(effects.save(folder / "effects"))

    return save


def _metric(config: RunConfig, model: LensModel, prompts: Sequence[ICLPrompt]) -> str:
    """The logit difference cannot saturate, but needs label words with different first tokens."""
    if config.attribution_metric != "auto":
        return config.attribution_metric
    template = prompts[0].template
    for words in {prompt.candidates or () for prompt in prompts}:
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
    """Tables of the effects of all seeds: ``attributions`` (one row per head), ``attribution_seeds`` (per seed)."""
    import pandas as pd

    if not found:
        return {}
    metrics = dict.fromkeys(e.metric for e in found.values())
    frames = [_heads(metric, [e for e in found.values() if e.metric == metric]) for metric in metrics]
    return {
        "attributions": pd.concat(frames, ignore_index=True),
        "attribution_seeds": pd.DataFrame([_seed_row(seed, e) for seed, e in found.items()]),
    }


def _heads(metric: str, effects: Sequence[HeadEffects]) -> pd.DataFrame:
    import pandas as pd

    sets = torch.cat([torch.full((len(e.in_context),), i) for i, e in enumerate(effects)])
    exact = hierarchical_bootstrap(torch.cat([e.exact for e in effects]).double(), sets=sets, seed=0)
    estimate = torch.stack([e.first_order.double().mean(0) for e in effects]).mean(0)
    n_layers, n_heads = estimate.shape
    layer, head = torch.meshgrid(torch.arange(n_layers), torch.arange(n_heads), indexing="ij")
    columns: dict[str, torch.Tensor] = {
        "layer": layer,
        "head": head,
        "exact": exact.estimate,
        "low": exact.low,
        "high": exact.high,
        "first_order": estimate,
    }
    return pd.DataFrame({name: t.flatten().numpy() for name, t in columns.items()}).assign(metric=metric)


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
        heads = effects.icl_heads()
        row |= {"heads_for_90_percent": len(heads.heads), "heads": " ".join(map(str, heads.heads))}
    except UndefinedMetricError:
        row |= {"heads_for_90_percent": -1, "heads": ""}
    try:
        row["first_order_correlation"] = effects.correlation
    except UndefinedMetricError:
        row["first_order_correlation"] = float("nan")
    return row
