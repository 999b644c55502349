"""The result of a run, read from its directory when asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.analysis import Comparison, HeadProfile, LabelFollowing, StaticAnswers, join_following
from metaopt_lens.decomposition import Decomposition
from metaopt_lens.experiments._attribution_stage import attribution_notes, load_attribution
from metaopt_lens.experiments._join import join_comparisons
from metaopt_lens.experiments._patch_stage import load_patch, patch_notes
from metaopt_lens.experiments._profile_stage import load_profile, profile_notes
from metaopt_lens.experiments._prompt_set import PromptSet
from metaopt_lens.experiments._run_config import Rule, RunConfig
from metaopt_lens.experiments._run_store import RUN_FILE, RunStore
from metaopt_lens.experiments._stages import (
    load_comparison,
    load_example,
    load_following,
    load_learning_rate,
    read_json,
)
from metaopt_lens.finetuning import LearningRateChoice, WeightUpdate
from metaopt_lens.interventions import HeadEffects
from metaopt_lens.tasks import Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class ExperimentResult:
    """A run's stored results. Nothing is read before it is asked for.

    Attributes:
        path: the directory.
        config: what was run.
        task: on what (without the function of a task made by one).
    """

    path: Path
    config: RunConfig
    task: Task

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExperimentResult:
        """Open the directory of a run, finished or not.

        Args:
            path: the run's directory.

        Raises:
            FileFormatError: it holds no run, or its description is damaged.
        """
        store = RunStore(path)
        body = store.read_run()
        if body is None:
            raise FileFormatError(
                f"{path} holds no run: there is no {RUN_FILE} in it. Give a directory that `metaopt-lens run` "
                "or `sweep` has written."
            )
        try:
            config = RunConfig.from_dict(body["config"], where=f"{store.folder / RUN_FILE}")
            return cls(store.folder, config, Task.from_dict(body["task"], where=f"{store.folder / RUN_FILE}"))
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{store.folder / RUN_FILE} is not the description of a run: {error!r}.") from None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the run."""
        return self.config.seeds

    @property
    def is_complete(self) -> bool:
        """Whether every piece is there, the tables included."""
        return self._store.is_finished("tables")

    # ---- pieces -------------------------------------------------------------------------------------------------

    def prompts(self, seed: int) -> PromptSet:
        """Demonstrations, queries and held-out rows of a seed.

        Args:
            seed: of the demonstration set.
        """
        return PromptSet.from_dict(read_json(self._piece(seed, "prompts") / "prompts.json"))

    def learning_rate(self, rule: Rule, seed: int) -> LearningRateChoice | None:
        """How the learning rate was chosen; None if it was given.

        Args:
            rule: ``"gd"`` or ``"lcgd"``.
            seed: of the demonstration set.
        """
        return load_learning_rate(self._piece(seed, f"lr-{rule}")) if self.config.lr == "auto" else None

    def label_following(self) -> LabelFollowing | None:
        """Who follows the demonstrations' label words, over all seeds; None for natural labels."""
        if self.config.labels == "natural":
            return None
        return join_following([load_following(self._piece(seed, "labels")) for seed in self.config.seeds])

    def finetuning(self, rule: Rule, seed: int) -> dict[str, Any]:
        """``lr``, ``losses`` (before every step) and ``notes``.

        Args:
            rule: ``"gd"`` or ``"lcgd"``.
            seed: of the demonstration set.
        """
        found: dict[str, Any] = read_json(self._piece(seed, self._rule(rule)) / "finetuning.json")
        return found

    def update(self, rule: Rule, seed: int) -> WeightUpdate:
        """The weight update, if the run was told to store it (``save_updates``).

        Args:
            rule: ``"gd"`` or ``"lcgd"``.
            seed: of the demonstration set.
        """
        if not self.config.save_updates:
            raise OptionError(f"{self.path} stores no weight updates: run with save_updates (--save-updates).")
        return WeightUpdate.load(self._piece(seed, self._rule(rule)) / "update")

    def comparison(self, rule: Rule, seed: int | None = None) -> Comparison:
        """In-context updates against those of finetuning by `rule`: of one seed, or of all together.

        Args:
            rule: ``"gd"`` or ``"lcgd"``.
            seed: of the demonstration set; None for all.
        """
        if seed is not None:
            return load_comparison(self._piece(seed, self._rule(rule)))
        if rule not in self._joined:
            self._joined[rule] = join_comparisons([self.comparison(rule, seed) for seed in self.seeds])
        return self._joined[rule]

    def attribution(self, seed: int) -> HeadEffects | None:
        """Effects of every head's meta-gradient; None if the model's heads could not be knocked out.

        Args:
            seed: of the demonstration set.
        """
        self._require("attribution", "the attribution to heads")
        return load_attribution(self._piece(seed, "attribution"))

    def profile(self, seed: int) -> HeadProfile | None:
        """Scores of every head by several theories; None if they could not be had (see `notes`).

        Args:
            seed: of the demonstration set.
        """
        self._require("profile", "the head profile")
        return load_profile(self._piece(seed, "profile"))

    def patch(self, seed: int) -> StaticAnswers | None:
        """Answers with one patch for all queries; None if it could not be had (see `notes`).

        Args:
            seed: of the demonstration set.
        """
        self._require("patch", "the patch for all queries")
        return load_patch(self._piece(seed, "patch"))

    def example(self) -> Decomposition | None:
        """The first prompt of the first seed, decomposed (without its model); None if it was too large to store."""
        return load_example(self._piece(self.seeds[0], "example"))

    # ---- tables -------------------------------------------------------------------------------------------------

    def table(self, name: str) -> pd.DataFrame:
        """A stored table.

        * ``summary``: `Comparison.summary` of all seeds, with a column ``rule``;
        * ``heads``: `Comparison.to_frame`, likewise: every statistic at every layer and head, with nulls and intervals;
        * ``accuracies``: accuracies and agreements with intervals over sets, Rec2FTP and its base rate with exact
          ones, and the queries ``n`` that each is of;
        * ``findings``: the questions of `Comparison.findings` with their answers;
        * ``set_means``: `Comparison.set_means`, each demonstration set under its seed;
        * ``predictions``: one row per rule, seed and query;
        * ``learning_rates``: what was tried, where the rate was chosen; ``losses``: of every finetuning step;
        * ``attributions``: effect of every head's meta-gradient over all seeds, ranked, with intervals;
          ``attribution_seeds``: per seed, gain and the heads that recover 90 percent of it on held-out queries;
          ``attribution_recovery``: how many heads that takes over all seeds, one row per metric;
        * ``findings``: the questions of `Comparison.findings` with answers, estimates and intervals, by rule;
        * ``ceiling``, ``ladder``, ``order``, ``algebra``: the further results, by rule, where they were asked for;
        * ``label_following``: see `LabelFollowing.to_frame`, where labels are flipped or neutral;
        * ``profile``: scores of every head by several theories, and ``profile_correlations``: Spearman's rho of every
          two; ``patch``: answers with one weight patch for all queries; where they were asked for.

        Args:
            name: one of those above.

        Raises:
            OptionError: there is no such table, or the run is not finished.
        """
        import pandas as pd

        folder = self._store.path("tables")
        if not self.is_complete:
            raise OptionError(f"the run in {self.path} is not finished: run it again to resume it.")
        file = folder / f"{name}.parquet"
        if not file.is_file():
            raise OptionError(f"there is no table {name!r}; this run has {', '.join(self.table_names)}.")
        return pd.read_parquet(file)

    @property
    def table_names(self) -> tuple[str, ...]:
        """Names of the stored tables."""
        return tuple(sorted(p.stem for p in self._store.path("tables").glob("*.parquet")))

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from what was asked for, in words."""
        found = {f"seed {seed}: {note}": None for seed in self.seeds for note in self.prompts(seed).notes}
        for rule in self.config.rules:
            for seed in self.seeds:
                found |= {f"seed {seed}, {rule}: {note}": None for note in self.finetuning(rule, seed)["notes"]}
        for stage, notes_of in (("attribution", attribution_notes), ("profile", profile_notes), ("patch", patch_notes)):
            if getattr(self.config, stage):
                for seed in self.seeds:
                    found |= {f"seed {seed}: {n}": None for n in notes_of(self._piece(seed, stage))}
        return tuple(found)

    # ---- provenance ---------------------------------------------------------------------------------------------

    @property
    def model(self) -> dict[str, Any]:
        """Name, sizes, revision and fingerprint of the model."""
        return self._json("model.json")

    @property
    def data(self) -> dict[str, Any]:
        """Source, revision and fingerprints of the rows."""
        return self._json("data.json")

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """One entry for each process that worked on the run: command, versions, times, pieces."""
        return [read_json(file) for file in sorted((self.path / "provenance").glob("*.json"))]

    # ---- helpers ------------------------------------------------------------------------------------------------

    @cached_property
    def _store(self) -> RunStore:
        return RunStore(self.path)

    @cached_property
    def _joined(self) -> dict[str, Comparison]:
        return {}

    def _json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.path / name)
        return found

    def _require(self, setting: str, what: str) -> None:
        if not getattr(self.config, setting):
            raise OptionError(f"the run in {self.path} was made without {what} ({setting} = false).")

    def _rule(self, rule: Rule) -> Rule:
        if rule not in self.config.rules:
            raise OptionError(f"the run in {self.path} has the rules {', '.join(self.config.rules)}, not {rule!r}.")
        return rule

    def _piece(self, seed: int, stage: str) -> Path:
        if seed not in self.seeds:
            raise OptionError(f"the run in {self.path} has the seeds {list(self.seeds)}, not {seed}.")
        name = f"seed-{seed}/{stage}"
        if not self._store.is_finished(name):
            raise FileFormatError(f"the run in {self.path} has no piece {name} (yet): run it again to resume it.")
        return self._store.path(name)

    def __repr__(self) -> str:
        c = self.config
        state = "complete" if self.is_complete else "not finished"
        return (
            f"ExperimentResult of {c.model} on {c.task} in {self.path} ({state}; {c.shots} shots, "
            f"{len(c.seeds)} seeds, {' and '.join(c.rules)})"
        )
