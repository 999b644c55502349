"""What a training run is: a frozen configuration, read from TOML."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from metaopt_lens._configuration import Count, NonNegative, read, read_file, settings
from metaopt_lens._errors import FileFormatError
from metaopt_lens.training._training_settings import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    MomentumSettings,
    OptimizerSettings,
    need,
)

SHIPPED = ("icl-small", "text-small", "paper-350m")


@settings
class TrainingConfig:
    """Everything that decides a training run; equal configurations give equal runs on one machine's CPU.

    Attributes:
        name: of the run, for tables.
        seed: of weights and data order.
        checkpoint_every: steps between checkpoints.
        note: free text, such as where the numbers are from.
    """

    name: str = "momentum"
    seed: NonNegative = 0
    checkpoint_every: Count = 200
    note: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    momentum: MomentumSettings = field(default_factory=MomentumSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        n_ctx, measured = self.model.n_ctx, self.evaluation
        for length in measured.context_lengths:
            need(length <= n_ctx, f"evaluation.context_lengths must be from 2 to n_ctx ({n_ctx})", length)
        if self.data.source == "synthetic":
            longest = 1 + 4 * max(self.data.n_items[1], max(measured.demos, default=0) + 1)
            need(longest <= n_ctx, f"model.n_ctx must hold the longest synthetic sequence ({longest})", n_ctx)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able data, tables within."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], *, where: str = "the configuration") -> TrainingConfig:
        """The reverse of `to_dict`; what is missing has its default.

        Args:
            body: fields and tables, as in a TOML file.
            where: the place that errors name.

        Raises:
            OptionError: an unknown table or field, a value of the wrong kind or out of range; `where` names the place.
        """
        return read(cls, body, where=where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingConfig:
        """Read a TOML file, or one of the shipped configurations by its name (`SHIPPED`).

        Args:
            path: a TOML file, or a name in `SHIPPED`.

        Raises:
            FileFormatError: the file is missing or no TOML.
            OptionError: see `from_dict`.
        """
        file = Path(path)
        if str(path) in SHIPPED:
            file = Path(__file__).parent / "configs" / f"{path}.toml"
        if not file.is_file():
            raise FileFormatError(f"there is no configuration {path}: give a TOML file or one of {', '.join(SHIPPED)}.")
        return cls.from_dict(read_file(file), where=str(path))

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with other values; for ``model``, ``momentum``, ... a dict changes fields of the table.

        Args:
            changes: new values by field.
        """
        body: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in changes.items():
            is_table = isinstance(value, Mapping) and dataclasses.is_dataclass(body.get(name))
            body[name] = {**dataclasses.asdict(body[name]), **value} if is_table else value
        return type(self)(**body)

    @property
    def has_momentum(self) -> bool:
        """Whether it is anything but plain attention."""
        return self.momentum.learned or self.momentum.eta != 0.0


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two configurations (see `TrainingConfig.to_dict`) differ: ``"optimizer.lr: 0.003 there, 0.001 here"``."""
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return found
