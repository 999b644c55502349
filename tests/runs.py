"""A run that takes seconds, its files, and children that can be killed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaopt_lens.experiments import RunConfig

SMALL = RunConfig(
    "tiny",
    "synthetic-2",
    shots=4,
    seeds=(0, 1),
    queries=3,
    lr=0.02,
    rules=("gd",),
    n_null_draws=2,
    random_weights=False,
    attribution_queries=1,
)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything that must be equal between equal runs: all but provenance and hidden working files."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith((".", "provenance/")):
            found[name] = file.read_bytes()
    return found


def fork(act: Callable[[], Any]) -> int:
    """Run `act` in a child that has everything imported and loaded; its exit status is 0 if nothing was raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has idle threads; the child uses none of them
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        act()
        status = 0
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
