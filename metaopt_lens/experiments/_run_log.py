"""The log of one process that worked on a run: command, versions, times; under ``provenance/``."""

from __future__ import annotations

import datetime
import os
import platform
import secrets
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch

from metaopt_lens._storage import provenance
from metaopt_lens.experiments._run_config import RunConfig
from metaopt_lens.experiments._run_store import RunStore
from metaopt_lens.experiments._stages import write_json
from metaopt_lens.models import LensModel, weights_file


class RunLog:
    """Written when the work begins, after every piece, and at the end.

    Args:
        store: of the run.
        config: of the run.
        model: what is run.
    """

    def __init__(self, store: RunStore, config: RunConfig, model: LensModel) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._store = store
        self._controls: dict[str, float] = {}
        self._name = f"{now:%Y%m%dT%H%M%S}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}.json"
        self._body: dict[str, Any] = {
            "command": sys.argv,
            "started": now.isoformat(timespec="seconds"),
            "ended": None,
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": str(model.device),
            "weights_file": weights_file(getattr(getattr(model.host, "original_model", None), "config", None)),
            "versions": provenance(),
            "config": config.to_dict(),
            "pieces": {},
        }
        self._write()

    def spend(self, seconds: Mapping[str, float]) -> None:
        """What the controls of the piece that is being made took."""
        self._controls = {name: round(took, 3) for name, took in seconds.items()}

    def add(self, piece: str, seconds: float) -> None:
        """A piece that was made, and what it took."""
        controls = {"controls": self._controls} if self._controls else {}
        self._body["pieces"][piece] = {"seconds": round(seconds, 3), **controls}
        self._controls = {}
        self._write()

    def end(self) -> None:
        """All is done that this process could do."""
        self._body["ended"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._write()

    def _write(self) -> None:
        with self._store.writing():
            write_json(self._store.folder / "provenance" / self._name, self._body)
