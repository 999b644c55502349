"""run_experiment(): one model on one task, piece by piece, so that it can be stopped and resumed at any time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from metaopt_lens._errors import MetaoptLensError
from metaopt_lens._progress import Progress
from metaopt_lens._threads import torch_threads
from metaopt_lens.experiments._attribution_stage import attribution
from metaopt_lens.experiments._patch_stage import patch
from metaopt_lens.experiments._plan import Piece, Plan
from metaopt_lens.experiments._profile_stage import profile
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._run_inputs import RunInputs, seeds_of
from metaopt_lens.experiments._run_log import RunLog
from metaopt_lens.experiments._run_result import ExperimentResult
from metaopt_lens.experiments._run_store import RUN_FILE, RunStore, require_own_version
from metaopt_lens.experiments._run_tables import save_tables
from metaopt_lens.experiments._stages import (
    Save,
    comparison,
    example,
    explain,
    label_following,
    learning_rate,
    save_prompts,
)
from metaopt_lens.tasks import Task


def run_experiment(
    config: RunConfig | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    model: Any = None,
    task: Task | None = None,
    only_seeds: Sequence[int] | None = None,
    recompute_damaged: bool = False,
    progress: bool = True,
) -> ExperimentResult:
    """Zero-shot, finetuned and in-context runs of a model on a task, compared head by head and stored.

    What is finished in `out` stays as it is; an interrupted run is resumed, and several processes may work on one
    directory. Equal configurations, models and data give equal files, except for ``provenance/``.

    Args:
        config: what to run: a `RunConfig`, or a table of its fields (``{"model": "tiny", "task": "synthetic"}``).
        out: directory of the results.
        model: a loaded model instead of the one that `config.model` names.
        task: a task instead of the one that `config.task` names.
        only_seeds: work on these seeds only; the tables are made by whoever finds all seeds finished.
        recompute_damaged: recompute damaged pieces instead of refusing them.
        progress: show the time left: a bar on a terminal, elsewhere a line for each piece in the log `metaopt_lens`.

    Returns:
        An `ExperimentResult`, which reads from `out`.

    Raises:
        OptionError: a setting that makes no sense, an unknown task, or seeds that are not the configuration's.
        DataError: the rows cannot be had, or are too few or wrong.
        PromptError: label words that the model's tokenizer cannot tell apart.
        OutputError: `out` cannot be written, or holds a run of another configuration, model or data, or one that
            another version of metaopt-lens began.
        FileFormatError: a stored piece is damaged.
    """
    config = config if isinstance(config, RunConfig) else RunConfig.from_dict(config)
    inputs = RunInputs(config, model=model, task=task)
    plan, store = Plan(config, seeds_of(config, only_seeds)), RunStore(out)
    store.prepare()
    store.read_run()
    store.check(RUN_FILE, inputs.description(), what="configuration")
    _require_intact(plan, store, recompute=recompute_damaged)
    result = ExperimentResult(store.folder, config, inputs.task)
    todo = [piece for piece in plan.pieces() if not store.is_finished(piece.name)]
    if todo:
        require_own_version([store])
        inputs.pin(store, [p.seed for p in todo if p.stage == "prompts" and p.seed is not None])
        with torch_threads(inputs.n_threads):
            _make(plan, todo, store, inputs, result, progress=progress)
    return result


def _require_intact(plan: Plan, store: RunStore, *, recompute: bool) -> None:
    """Refuse damaged pieces, or remove them, and the tables with them."""
    names = [piece.name for piece in plan.pieces(plan.config.seeds)]
    removed = store.require_intact(names, recompute=recompute)
    if removed and "tables" not in removed:
        store.require_intact(["tables"], recompute=True)


def _make(
    plan: Plan, todo: Sequence[Piece], store: RunStore, inputs: RunInputs, result: ExperimentResult, *, progress: bool
) -> None:
    log = RunLog(store, plan.config, inputs.model)
    title = f"{plan.config.model} on {inputs.task.name}"
    with Progress(sum(piece.share for piece in todo), title, shown=progress) as shown:
        for piece in plan.in_turn(todo, store, lambda done: shown.advance(done.share, done.name)):
            started = time.monotonic()
            try:
                save = _compute(piece, inputs, result, log)
            except MetaoptLensError as error:
                raise explain(error, f"piece {piece.name} of {store.folder}") from error
            store.write(piece.name, save)
            log.add(piece.name, time.monotonic() - started)
    log.end()


def _compute(piece: Piece, inputs: RunInputs, result: ExperimentResult, log: RunLog) -> Save:
    config, seed, stage = inputs.config, piece.seed, piece.stage
    if seed is None:
        return save_tables(result)
    if stage == "prompts":
        return save_prompts(inputs.prompts(seed))
    prompts = result.prompts(seed)
    if stage == "example":
        return example(config, inputs.model, prompts)
    if stage == "labels":
        return label_following(config, inputs.model, prompts, seed)
    if stage == "attribution":
        return attribution(config, inputs.model, prompts)
    if stage == "profile":
        return profile(config, inputs.model, prompts, result.comparison(config.rules[0], seed), seed)
    if stage == "patch":
        return patch(config, inputs.model, prompts)
    rule = next(rule for rule in config.rules if stage in (rule, f"lr-{rule}"))
    if stage != rule:
        return learning_rate(config, inputs.model, prompts, rule)
    choice = result.learning_rate(rule, seed)
    lr = float(config.lr) if choice is None else choice.lr
    return comparison(config, inputs.model, prompts, rule, lr, seed, spent=log.spend)
