"""run_experiment(): one model on one task, piece by piece, so that it can be stopped and resumed at any time."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from tqdm.auto import tqdm

from metaopt_lens._errors import DataError, MetaoptLensError, OptionError
from metaopt_lens._storage import provenance
from metaopt_lens._threads import torch_threads
from metaopt_lens.experiments._attribution_stage import attribution
from metaopt_lens.experiments._model_identity import model_identity
from metaopt_lens.experiments._prompt_set import PromptSet, make_prompts
from metaopt_lens.experiments._run_config import RunConfig, deciding_fields
from metaopt_lens.experiments._run_result import ExperimentResult, make_tables
from metaopt_lens.experiments._run_store import RUN_FILE, RUN_FORMAT, RunStore
from metaopt_lens.experiments._stages import (
    Save,
    comparison,
    example,
    explain,
    learning_rate,
    save_prompts,
    write_json,
)
from metaopt_lens.finetuning import require_raw_weights
from metaopt_lens.models import LensModel, load_model, wrap
from metaopt_lens.tasks import Task, TaskRows, find_task, load_rows

_WAIT_S = 0.2  # between looks at a piece that another process works on
_SHARES = {
    "prompts": 1,
    "lr": 5,
    "attribution": 6,
    "example": 1,
    "tables": 2,
}  # of the work, roughly, for the time left
_COMPARISON_SHARE = 8
_SMALL_MODEL = 10_000_000  # parameters


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One unit of work; `seed` is None for the tables."""

    seed: int | None
    stage: str

    @property
    def name(self) -> str:
        return self.stage if self.seed is None else f"seed-{self.seed}/{self.stage}"

    @property
    def share(self) -> int:
        return _SHARES.get(self.stage.split("-")[0], _COMPARISON_SHARE)


def run_experiment(
    config: RunConfig,
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
    directory. Equal configurations, models and data give equal files, but for ``provenance/``.

    Args:
        config: what to run.
        out: directory of the results.
        model: a loaded model instead of the one that `config.model` names.
        task: a task instead of the one that `config.task` names.
        only_seeds: work on these seeds only; the tables are made by whoever finds all seeds finished.
        recompute_damaged: recompute damaged pieces instead of refusing them.
        progress: show a progress bar with the time left (on a terminal).

    Returns:
        An `ExperimentResult`, which reads from `out`.

    Raises:
        OptionError: an unknown task, or seeds that are not the configuration's.
        DataError: the rows cannot be had, or are too few or wrong.
        PromptError: label words that the model's tokenizer cannot tell apart.
        OutputError: `out` cannot be written, or holds a run of another configuration, model or data.
        FileFormatError: a stored piece is damaged.
    """
    return _Run(config, out, model=model, task=task, only_seeds=only_seeds).work(
        recompute_damaged=recompute_damaged, progress=progress
    )


def load_run_model(config: RunConfig, *, cache: bool = True) -> Any:
    """The model that a configuration names, as `load_model` loads it.

    Args:
        config: names the model and where it runs.
        cache: keep the converted form of a GGUF file.
    """
    return load_model(
        config.model,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        revision=config.revision,
        n_devices=config.n_devices,
        device_map=config.device_map,
        cache=cache,
    )


def find_run_task(config: RunConfig) -> Task:
    """The task that a configuration names, in its variant.

    Args:
        config: names the task.

    Raises:
        OptionError: there is no such task.
    """
    found = find_task(config.task)
    return found.one_line() if config.variant == "one-line" else found


class _Run:
    """The state of one process that works on a run."""

    def __init__(
        self,
        config: RunConfig,
        out: str | os.PathLike[str],
        *,
        model: Any,
        task: Task | None,
        only_seeds: Sequence[int] | None,
    ) -> None:
        self.config = config
        if task is not None and config.variant == "one-line":
            task = task.one_line()
        self.task = find_run_task(config) if task is None else task
        self.seeds = config.seeds if only_seeds is None else tuple(only_seeds)
        strange = sorted(set(self.seeds) - set(config.seeds))
        if strange:
            raise OptionError(f"the configuration has the seeds {list(config.seeds)}, not {strange[0]}.")
        self.store = RunStore(out)
        self._given_model = model
        self._rows: dict[int, TaskRows] = {}
        self._log: dict[str, Any] = {}

    # ---- the order of things ------------------------------------------------------------------------------------

    def work(self, *, recompute_damaged: bool, progress: bool) -> ExperimentResult:
        self.store.prepare()
        self.store.read_run()
        self.store.check(RUN_FILE, self._description(), what="configuration")
        result = ExperimentResult(self.store.folder, self.config, self.task)
        removed = self.store.require_intact(
            [p.name for p in self._plan(self.config.seeds)], recompute=recompute_damaged
        )
        if removed and "tables" not in removed:
            self.store.require_intact(["tables"], recompute=True)
        todo = [p for p in self._plan(self.seeds) if not self.store.is_finished(p.name)]
        if not todo:
            return result
        self._check_before_any_run([p.seed for p in todo if p.stage == "prompts" and p.seed is not None])
        with torch_threads(self._n_threads):
            self._make(todo, result, progress=progress)
        return result

    def _make(self, todo: list[_Piece], result: ExperimentResult, *, progress: bool) -> None:
        self._start_log()
        bar = tqdm(
            total=sum(p.share for p in todo),
            desc=f"{self.config.model} on {self.task.name}",
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left{postfix}",
            disable=None if progress else True,
        )
        with bar:
            for piece in self._ready(todo, lambda finished: bar.update(finished.share)):
                bar.set_postfix_str(piece.name)
                started = time.monotonic()
                try:
                    save = self._compute(piece, result)
                except MetaoptLensError as error:
                    raise explain(error, f"piece {piece.name} of {self.store.folder}") from error
                self.store.write(piece.name, save)
                self._add_to_log(piece, time.monotonic() - started)
        self._end_log()

    @property
    def _n_threads(self) -> int:
        small = sum(p.numel() for p in self.model.host.parameters()) < _SMALL_MODEL
        return self.config.threads or (1 if small else torch.get_num_threads())

    def _plan(self, seeds: Sequence[int]) -> list[_Piece]:
        """All pieces, in the order in which they need each other."""
        plan = [_Piece(seed, "prompts") for seed in seeds]
        for seed in seeds:
            for rule in self.config.rules:
                plan += [_Piece(seed, f"lr-{rule}")] if self.config.lr == "auto" else []
                plan.append(_Piece(seed, rule))
            plan += [_Piece(seed, "attribution")] if self.config.attribution else []
            plan += [_Piece(seed, "example")] if seed == self.config.seeds[0] else []
        return [*plan, _Piece(None, "tables")]

    def _ready(self, todo: list[_Piece], done: Callable[[_Piece], Any]) -> Iterator[_Piece]:
        """Pieces to make, one at a time and locked; those that another process is making are tried again later."""
        waiting = list(todo)
        while waiting:
            later = []
            for piece in waiting:
                if self.store.is_finished(piece.name):
                    done(piece)
                elif not all(self.store.is_finished(name) for name in self._needs(piece)):
                    later.append(piece)
                else:
                    with self.store.lock(piece.name) as mine:
                        if not mine:
                            later.append(piece)
                            continue
                        if not self.store.is_finished(piece.name):
                            yield piece
                        done(piece)
            if len(later) == len(waiting):
                if self._only_waits_for_others(later):
                    return
                time.sleep(_WAIT_S)
            waiting = later

    def _needs(self, piece: _Piece) -> list[str]:
        if piece.stage == "prompts":
            return []
        if piece.seed is None:
            return [p.name for p in self._plan(self.config.seeds) if p != piece]
        lr = [f"seed-{piece.seed}/lr-{piece.stage}"] if piece.stage in self.config.rules else []
        return [f"seed-{piece.seed}/prompts", *(lr if self.config.lr == "auto" else [])]

    def _only_waits_for_others(self, waiting: Sequence[_Piece]) -> bool:
        """Whether all that is left are tables over seeds that are not this process's."""
        if self.seeds == self.config.seeds or any(p.seed is not None for p in waiting):
            return False
        mine = {p.name for p in self._plan(self.seeds)}
        missing = [name for p in waiting for name in self._needs(p) if not self.store.is_finished(name)]
        return any(name not in mine for name in missing)

    # ---- what pieces need ---------------------------------------------------------------------------------------

    def _check_before_any_run(self, seeds_without_prompts: Sequence[int]) -> None:
        """Data, model, label words and sizes are looked at before anything is computed."""
        for seed in seeds_without_prompts:
            self._rows_of(seed)
        if self._rows:
            self.store.check("data.json", self._data_description(), what="data set")
        require_raw_weights(self.model, allow_processed=self.config.allow_processed)
        self.store.check("model.json", self._model_description, what="model")
        for seed in seeds_without_prompts:
            self._prompts_of(seed)
        self.store.pin(RUN_FILE, self._description(), what="configuration")
        if self._rows:
            self.store.pin("data.json", self._data_description(), what="data set")
        self.store.pin("model.json", self._model_description, what="model")

    @cached_property
    def model(self) -> LensModel:
        """Loaded when first needed."""
        return wrap(load_run_model(self.config) if self._given_model is None else self._given_model)

    def _rows_of(self, seed: int) -> TaskRows:
        if self.task.make_rows is not None:
            if seed not in self._rows:
                if self.config.data is not None:
                    raise DataError(
                        f"task {self.task.name!r} makes its own rows: leave out the data {self.config.data}."
                    )
                self._rows[seed] = self.task.make_rows(seed)
        elif seed not in self._rows:
            found = next(iter(self._rows.values()), None)
            self._rows[seed] = load_rows(self.task, self.config.data) if found is None else found
        return self._rows[seed]

    def _prompts_of(self, seed: int) -> PromptSet:
        return make_prompts(self.config, self.task, self._rows_of(seed), self.model, seed)

    # ---- pieces -------------------------------------------------------------------------------------------------

    def _compute(self, piece: _Piece, result: ExperimentResult) -> Save:
        if piece.seed is None:
            return self._tables(result)
        if piece.stage == "prompts":
            return save_prompts(self._prompts_of(piece.seed))
        prompts = result.prompts(piece.seed)
        if piece.stage == "example":
            return example(self.config, self.model, prompts)
        if piece.stage == "attribution":
            return attribution(self.config, self.model, prompts)
        for rule in self.config.rules:
            if piece.stage == f"lr-{rule}":
                return learning_rate(self.config, self.model, prompts, rule)
            if piece.stage == rule:
                choice = result.learning_rate(rule, piece.seed)
                lr = float(self.config.lr) if choice is None else choice.lr
                return comparison(self.config, self.model, prompts, rule, lr, piece.seed)
        raise AssertionError(piece)

    def _tables(self, result: ExperimentResult) -> Save:
        tables = make_tables(result)

        def save(folder: Any) -> None:
            for name, table in tables.items():
                table.to_parquet(folder / f"{name}.parquet", index=False)

        return save

    # ---- descriptions -------------------------------------------------------------------------------------------

    def _description(self) -> dict[str, Any]:
        body = self.config.to_dict()
        return {
            "kind": "metaopt-lens run",
            "format": RUN_FORMAT,
            "config": {name: body[name] for name in deciding_fields()},
            "fingerprint": self.config.fingerprint,
            "task": self.task.to_dict(),
        }

    @cached_property
    def _model_description(self) -> dict[str, Any]:
        return model_identity(self.model)

    def _data_description(self) -> dict[str, Any]:
        """Of the whole data set, or of all seeds' rows where they are made by seed."""
        if self.task.make_rows is None:
            first = next(iter(self._rows.values()))
            return {
                "source": first.source,
                "revision": first.revision,
                "fingerprint": first.fingerprint,
                "train_rows": len(first.train),
                "validation_rows": len(first.validation),
            }
        rows = {seed: self._rows_of(seed) for seed in self.config.seeds}
        return {
            "source": next(iter(rows.values())).source,
            "revision": None,
            "fingerprint": {str(seed): found.fingerprint for seed, found in rows.items()},
            "train_rows": {str(seed): len(found.train) for seed, found in rows.items()},
            "validation_rows": {str(seed): len(found.validation) for seed, found in rows.items()},
        }

    # ---- provenance ---------------------------------------------------------------------------------------------

    def _start_log(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._log_name = f"{now:%Y%m%dT%H%M%S}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}.json"
        self._log = {
            "command": sys.argv,
            "started": now.isoformat(timespec="seconds"),
            "ended": None,
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": str(self.model.device),
            "versions": provenance(),
            "config": self.config.to_dict(),
            "pieces": {},
        }
        self._write_log()

    def _add_to_log(self, piece: _Piece, seconds: float) -> None:
        self._log["pieces"][piece.name] = {"seconds": round(seconds, 3)}
        self._write_log()

    def _end_log(self) -> None:
        self._log["ended"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._write_log()

    def _write_log(self) -> None:
        with self.store.writing():
            write_json(self.store.folder / "provenance" / self._log_name, self._log)
