"""The tables of a finished run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis import Comparison, Further, exact_interval
from metaopt_lens.experiments._attribution_stage import attribution_tables
from metaopt_lens.experiments._patch_stage import patch_table
from metaopt_lens.experiments._profile_stage import profile_tables
from metaopt_lens.experiments._run_config import Rule
from metaopt_lens.experiments._run_result import ExperimentResult
from metaopt_lens.experiments._stages import Save

if TYPE_CHECKING:
    import pandas as pd


def save_tables(result: ExperimentResult) -> Save:
    """The piece ``tables``: every table of `ExperimentResult.table`, as Parquet."""
    tables = make_tables(result)

    def save(folder: Path) -> None:
        for name, table in tables.items():
            table.to_parquet(folder / f"{name}.parquet", index=False)

    return save


def make_tables(result: ExperimentResult) -> dict[str, pd.DataFrame]:
    """All tables of a run whose other pieces are finished."""
    config = result.config
    joined = {rule: result.comparison(rule) for rule in config.rules}
    tables = {
        "summary": _stack({rule: c.summary() for rule, c in joined.items()}),
        "heads": _stack({rule: c.to_frame() for rule, c in joined.items()}),
        "accuracies": _stack({rule: _accuracies(c) for rule, c in joined.items()}),
        "findings": _stack({rule: _findings(c) for rule, c in joined.items()}),
        "set_means": _stack({rule: _by_seed(c, config.seeds) for rule, c in joined.items()}),
        "predictions": _stack({rule: _predictions(result, rule, config.seeds) for rule in config.rules}),
    }
    tables |= _training(result)
    tables |= _further(joined)
    following = result.label_following()
    if following is not None:
        tables["label_following"] = following.to_frame()
    if config.attribution:
        effects = {seed: e for seed in config.seeds if (e := result.attribution(seed)) is not None}
        tables |= attribution_tables(effects)
    if config.profile:
        tables |= profile_tables([found for seed in config.seeds if (found := result.profile(seed)) is not None])
    if config.patch:
        tables |= patch_table([own for seed in config.seeds if (own := result.patch(seed)) is not None])
    return tables


def _further(joined: Mapping[Rule, Comparison]) -> dict[str, pd.DataFrame]:
    """The further results that there are, by their names in `Further`."""
    tables = {}
    for field in dataclasses.fields(Further):
        found = {rule: getattr(c.further, field.name, None) for rule, c in joined.items()}
        frames = {rule: one.to_frame() for rule, one in found.items() if one is not None}
        if frames:
            tables[field.name] = _stack(frames)
    return tables


def _training(result: ExperimentResult) -> dict[str, pd.DataFrame]:
    """Learning rates that were tried, where one was chosen, and the losses of all steps."""
    import pandas as pd

    rates, losses = [], []
    for rule in result.config.rules:
        for seed in result.config.seeds:
            place = {"rule": rule, "seed": seed}
            choice = result.learning_rate(rule, seed)
            if choice is not None:
                rates.append(choice.to_frame().assign(chosen=[r == choice.lr for r in choice.rates], **place))
            found = result.finetuning(rule, seed)
            losses.append(pd.DataFrame({**place, "step": range(len(found["losses"])), "loss": found["losses"]}))
    chosen = {"learning_rates": pd.concat(rates, ignore_index=True)} if rates else {}
    return {**chosen, "losses": pd.concat(losses, ignore_index=True)}


def _stack(frames: Mapping[Rule, pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat([frame.assign(rule=rule) for rule, frame in frames.items()], ignore_index=True)


def _accuracies(comparison: Comparison) -> pd.DataFrame:
    import pandas as pd

    try:
        table = comparison.accuracies()
        recall = comparison.rec2ftp()
    except UndefinedMetricError:  # a single candidate: nothing to predict
        return pd.DataFrame({"quantity": [], "value": [], "low": [], "high": [], "n": []})
    undefined = float("nan")
    rows = []
    for name, k, n in (
        ("Rec2FTP %", recall.both, recall.ft),
        ("Rec2FTP base rate %", recall.icl, recall.zs_wrong),
    ):
        low, high = exact_interval(k, n) or (undefined, undefined)
        value = 100 * k / n if n else undefined
        rows.append({"quantity": name, "value": value, "low": low, "high": high, "n": n})
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)


def _findings(comparison: Comparison) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([dataclasses.asdict(found) for found in comparison.findings()])


def _by_seed(comparison: Comparison, seeds: Sequence[int]) -> pd.DataFrame:
    """`Comparison.set_means`, each set under its seed."""
    found = comparison.set_means()
    return found.assign(set=[seeds[index] for index in found["set"]])


def _predictions(result: ExperimentResult, rule: Rule, seeds: Sequence[int]) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for seed in seeds:
        prompts, found = result.prompts(seed), result.comparison(rule, seed)
        words = found.settings["candidates"] or ()
        frame = pd.DataFrame(
            {
                "seed": seed,
                "row": prompts.rows["queries"],
                "query": [p.query for p in prompts.prompts],
                "label": [p.label for p in prompts.prompts],
            }
        )
        for name in ("zs", "icl", "ft"):
            predicted = getattr(found, name)
            frame[name] = None if predicted is None else [words[i] for i in predicted.tolist()]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
