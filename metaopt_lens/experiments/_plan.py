"""The pieces of a run: which there are, which need which, and the order in which one process makes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._run_store import RunStore

_WAIT_S = 0.2  # between looks at a piece that another process works on
# Of the work, roughly, for the time left.
_SHARES = {"prompts": 1, "lr": 5, "attribution": 6, "profile": 3, "patch": 3, "example": 1, "tables": 2}
_COMPARISON_SHARE = 8


@dataclass(frozen=True)
class Piece:
    """One unit of work; `seed` is None for the tables."""

    seed: int | None
    stage: str

    @property
    def name(self) -> str:
        """Where it is stored."""
        return self.stage if self.seed is None else f"seed-{self.seed}/{self.stage}"

    @property
    def share(self) -> int:
        """How much work it is, roughly."""
        return _SHARES.get(self.stage.split("-")[0], _COMPARISON_SHARE)


@dataclass(frozen=True)
class Plan:
    """What one process does of a run.

    Attributes:
        config: what is run.
        seeds: the ones that this process works on.
    """

    config: RunConfig
    seeds: tuple[int, ...]

    def pieces(self, seeds: Sequence[int] | None = None) -> list[Piece]:
        """All pieces of some seeds (by default this process's), in the order in which they need each other."""
        config, seeds = self.config, self.seeds if seeds is None else seeds
        found = [Piece(seed, "prompts") for seed in seeds]
        for seed in seeds:
            for rule in config.rules:
                found += [Piece(seed, f"lr-{rule}")] if config.lr == "auto" else []
                found.append(Piece(seed, rule))
            found += [Piece(seed, "labels")] if config.labels != "natural" else []
            found += [Piece(seed, "attribution")] if config.attribution else []
            found += [Piece(seed, "profile")] if config.profile else []
            found += [Piece(seed, "patch")] if config.patch else []
            found += [Piece(seed, "example")] if seed == config.seeds[0] else []
        return [*found, Piece(None, "tables")]

    def needs(self, piece: Piece) -> list[str]:
        """Names of the pieces that must be finished first."""
        if piece.stage == "prompts":
            return []
        if piece.seed is None:
            return [p.name for p in self.pieces(self.config.seeds) if p != piece]
        if piece.stage == "profile":
            return [f"seed-{piece.seed}/prompts", f"seed-{piece.seed}/{self.config.rules[0]}"]
        lr = [f"seed-{piece.seed}/lr-{piece.stage}"] if piece.stage in self.config.rules else []
        return [f"seed-{piece.seed}/prompts", *(lr if self.config.lr == "auto" else [])]

    def in_turn(self, todo: Sequence[Piece], store: RunStore, done: Callable[[Piece], Any]) -> Iterator[Piece]:
        """Pieces to make, one at a time and locked; those that another process is making are tried again later.

        Args:
            todo: what is to be done.
            store: where it is stored.
            done: called with every piece that is finished, whoever made it.
        """
        waiting = list(todo)
        while waiting:
            later = []
            for piece in waiting:
                if store.is_finished(piece.name):
                    done(piece)
                elif not all(store.is_finished(name) for name in self.needs(piece)):
                    later.append(piece)
                else:
                    with store.lock(piece.name) as mine:
                        if not mine:
                            later.append(piece)
                            continue
                        if not store.is_finished(piece.name):
                            yield piece
                        done(piece)
            if len(later) == len(waiting):
                if self._only_waits_for_others(later, store):
                    return
                time.sleep(_WAIT_S)
            waiting = later

    def _only_waits_for_others(self, waiting: Sequence[Piece], store: RunStore) -> bool:
        """Whether all that is left are tables over seeds that are not this process's."""
        if self.seeds == self.config.seeds or any(p.seed is not None for p in waiting):
            return False
        mine = {p.name for p in self.pieces()}
        missing = [name for p in waiting for name in self.needs(p) if not store.is_finished(name)]
        return any(name not in mine for name in missing)
