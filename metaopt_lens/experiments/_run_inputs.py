"""What a run works on: its model, its task's rows, its prompts; and their descriptions, which must stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from metaopt_lens._errors import DataError, OptionError
from metaopt_lens.experiments._model_identity import model_identity
from metaopt_lens.experiments._prompt_set import PromptSet, make_prompts
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._run_store import RUN_FILE, RUN_FORMAT, RunStore
from metaopt_lens.finetuning import require_raw_weights
from metaopt_lens.models import LensModel, load_model, wrap
from metaopt_lens.tasks import Task, TaskRows, find_task, load_rows

_SMALL_MODEL = 10_000_000  # parameters


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


class RunInputs:
    """Model, rows and prompts of a run, each found when first needed.

    Args:
        config: what is run.
        model: a loaded model instead of the one that `config.model` names.
        task: a task instead of the one that `config.task` names.
    """

    def __init__(self, config: RunConfig, *, model: Any, task: Task | None) -> None:
        self.config = config
        if task is None:
            self.task = find_run_task(config)
        else:
            self.task = task.one_line() if config.variant == "one-line" else task
        self._given_model = model
        self._rows: dict[int, TaskRows] = {}

    @cached_property
    def model(self) -> LensModel:
        """Loaded when first needed."""
        return wrap(load_run_model(self.config) if self._given_model is None else self._given_model)

    @property
    def n_threads(self) -> int:
        """Of torch."""
        small = sum(p.numel() for p in self.model.host.parameters()) < _SMALL_MODEL
        return self.config.threads or (1 if small else torch.get_num_threads())

    def prompts(self, seed: int) -> PromptSet:
        """Demonstrations, queries and held-out rows of a seed."""
        return make_prompts(self.config, self.task, self.rows(seed), self.model, seed)

    def rows(self, seed: int) -> TaskRows:
        """The task's rows, the same for every seed but for tasks that make them."""
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

    def pin(self, store: RunStore, seeds_without_prompts: Sequence[int]) -> None:
        """Look at data, model, label words and sizes before anything is computed, and write down what they are.

        Args:
            store: of the run.
            seeds_without_prompts: whose rows are needed.

        Raises:
            OutputError: the directory holds a run of other data or of another model.
        """
        for seed in seeds_without_prompts:
            self.rows(seed)
        if self._rows:
            store.check("data.json", self._data_description(), what="data set")
        require_raw_weights(self.model, allow_processed=self.config.allow_processed)
        store.check("model.json", self._model_description, what="model")
        for seed in seeds_without_prompts:
            self.prompts(seed)
        store.pin(RUN_FILE, self.description(), what="configuration")
        if self._rows:
            store.pin("data.json", self._data_description(), what="data set")
        store.pin("model.json", self._model_description, what="model")

    def description(self) -> dict[str, Any]:
        """Of the run itself."""
        return {
            "kind": "metaopt-lens run",
            "format": RUN_FORMAT,
            "config": self.config.deciding(),
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
        rows = {seed: self.rows(seed) for seed in self.config.seeds}
        return {
            "source": next(iter(rows.values())).source,
            "revision": None,
            "fingerprint": {str(seed): found.fingerprint for seed, found in rows.items()},
            "train_rows": {str(seed): len(found.train) for seed, found in rows.items()},
            "validation_rows": {str(seed): len(found.validation) for seed, found in rows.items()},
        }


def seeds_of(config: RunConfig, only: Sequence[int] | None) -> tuple[int, ...]:
    """The seeds to work on.

    Args:
        config: has them all.
        only: these; None for all.

    Raises:
        OptionError: a seed that the configuration does not have.
    """
    strange = sorted(set(only or ()) - set(config.seeds))
    if strange:
        raise OptionError(f"the configuration has the seeds {list(config.seeds)}, not {strange[0]}.")
    return config.seeds if only is None else tuple(only)
