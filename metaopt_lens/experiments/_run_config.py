"""What a run is: a frozen configuration that goes to JSON and TOML and back, with a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.extraction import Scoring
from metaopt_lens.prompts.tasks import SELECTIONS, Selection

Rule = Literal["gd", "lcgd"]
RULES: tuple[Rule, ...] = ("gd", "lcgd")
DTYPES = ("float32", "bfloat16", "float16", "float64")

_SMALLEST = {
    "shots": 1,
    "queries": 2,
    "epochs": 1,
    "held_out": 1,
    "n_candidates": 2,
    "n_null_draws": 1,
    "subspace_dim": 1,
    "attribution_queries": 1,
    "batch_size": 1,
    "n_devices": 1,
    "threads": 1,
}
_ALLOWED: dict[str, tuple[str, ...]] = {
    "variant": ("published", "one-line"),
    "selection": SELECTIONS,
    "scoring": ("mean", "first"),
    "attribution_metric": ("auto", "logit_difference", "label_log_prob"),
    "dtype": DTYPES,
}
_PLACE = {"place": True}  # where and with what it runs; does not decide the result


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the results of a run.

    Attributes:
        model: a name on the hub, a local folder, or ``"tiny"``.
        task: name of a task, or a TOML file.
        shots: demonstrations, or as many of them as fit the context window.
        seeds: one demonstration set each; a number n stands for seeds 0 to n - 1.
        queries: how many rows to ask; None for all. The same for every seed (but for tasks made by seed).
        lr: learning rate, or ``"auto"``: chosen for every seed and rule on `held_out` rows beside the demonstrations.
        variant: ``"published"`` templates, or ``"one-line"`` ones as in the released code.
        selection, permutation: of demonstrations, see `select_demos`.
        rules: ``"gd"`` (ordinary finetuning) and ``"lcgd"`` (layer-causal).
        epochs: passes over the demonstrations.
        held_out: rows for the choice of the learning rate, at most.
        n_candidates: for open vocabularies: how many outputs each query chooses among; None for all that occur.
        scoring: of label words, ``"mean"`` log-probability of their tokens or the ``"first"`` token's.
        random_weights: also run on permuted weights (costs the model's memory once more and about doubles the time).
        unrelated: also finetune on unrelated texts.
        attribution: also measure what every head's meta-gradient does to the answers, on the first
            `attribution_queries` queries; attribution_metric: see `head_effects` (``"auto"``: the logit difference
            where the label words differ in their first token, else the log-probability).
        n_null_draws, subspace_dim, reference: see `compare`.
        prepend_bos: put BOS first; None for the model's default.
        dtype: floating-point type of the weights; revision: of a model on the hub.
        batch_size: sequences run together; fixed, since sums in another order differ in their last digits.
        save_updates: store the weight updates as well.
        allow_processed: accept a model with folded norms or biases.
        data: local file or folder with the task's rows; None for the hub.
        device, n_devices, device_map: where the model runs; passed to TransformerLens.
        threads: of torch; None for its own choice, but one for models so small that threads only wait for each other.
    """

    model: str
    task: str
    shots: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    queries: int | None = None
    lr: float | Literal["auto"] = "auto"
    variant: Literal["published", "one-line"] = "published"
    selection: Selection = "balanced"
    permutation: int = 0
    rules: tuple[Rule, ...] = RULES
    epochs: int = 1
    held_out: int = 32
    n_candidates: int | None = None
    scoring: Scoring = "mean"
    random_weights: bool = True
    unrelated: bool = True
    attribution: bool = True
    attribution_queries: int = 16
    attribution_metric: Literal["auto", "logit_difference", "label_log_prob"] = "auto"
    n_null_draws: int = 20
    subspace_dim: int = 4
    reference: bool = False
    prepend_bos: bool | None = None
    dtype: str = "float32"
    revision: str | None = None
    batch_size: int = 16
    save_updates: bool = False
    allow_processed: bool = False
    data: str | None = field(default=None, metadata=_PLACE)
    device: str | None = field(default=None, metadata=_PLACE)
    n_devices: int | None = field(default=None, metadata=_PLACE)
    device_map: str | None = field(default=None, metadata=_PLACE)
    threads: int | None = field(default=None, metadata=_PLACE)

    def __post_init__(self) -> None:
        _check({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything but the place where it runs."""
        body = {name: value for name, value in self.to_dict().items() if name in deciding_fields()}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able data."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], *, where: str = "the configuration") -> RunConfig:
        """The reverse of `to_dict`; ``seeds = 3`` means seeds 0, 1, 2.

        Raises:
            OptionError: an unknown field, a missing one, or a value that makes no sense; `where` names the place.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(body) - set(known))
        if unknown:
            raise OptionError(
                f"{where} has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(known)}."
            )
        missing = [name for name in ("model", "task") if name not in body]
        if missing:
            raise OptionError(f"{where} does not say which {' and '.join(missing)}.")
        values = dict(body)
        seeds = values.get("seeds")
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            values["seeds"] = tuple(range(seeds))
        for name in ("seeds", "rules"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        try:
            _check(values)
            return cls(**values)
        except (OptionError, TypeError) as error:
            raise OptionError(f"{where}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a TOML or JSON file.

        Raises:
            FileFormatError: the file is missing or not valid.
            OptionError: see `from_dict`.
        """
        body = read_settings(path)
        return cls.from_dict(body, where=str(path))

    def to_toml(self) -> str:
        """As TOML, which `load` reads; fields that are None are left out."""
        # A JSON string, number, boolean or list of them is also TOML.
        lines = [f"{name} = {json.dumps(value)}" for name, value in self.to_dict().items() if value is not None]
        return "\n".join(lines) + "\n"


def _check(values: Mapping[str, Any]) -> None:
    """Raise `OptionError` for values that make no sense; fields that are missing are not looked at."""
    for name, smallest in _SMALLEST.items():
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < smallest):
            raise OptionError(f"{name} must be a whole number of at least {smallest}, got {value!r}.")
    lr, seeds, rules = values.get("lr", "auto"), values.get("seeds", (0,)), values.get("rules", RULES)
    if lr != "auto" and not (isinstance(lr, (int, float)) and math.isfinite(lr) and lr > 0):
        raise OptionError(f"lr must be 'auto' or a positive, finite number, got {lr!r}.")
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise OptionError(f"seeds must be one or several different numbers from 0 on, got {list(seeds)}.")
    if not rules or len(set(rules)) < len(rules) or not set(rules) <= set(RULES):
        raise OptionError(f"rules must be 'gd', 'lcgd' or both, got {list(rules)}.")
    for name, allowed in _ALLOWED.items():
        if values.get(name, allowed[0]) not in allowed:
            raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {values[name]!r}.")


def deciding_fields() -> tuple[str, ...]:
    """The fields that decide the results."""
    return tuple(f.name for f in dataclasses.fields(RunConfig) if not f.metadata.get("place"))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a TOML or JSON file.

    Raises:
        FileFormatError: the file is missing or not valid.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"the file {file} cannot be read ({getattr(error, 'strerror', None) or error})."
        ) from None
    kind = "JSON" if file.suffix == ".json" else "TOML"
    try:
        body = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except ValueError as error:
        raise FileFormatError(f"the file {file} is not valid {kind} ({error}).") from None
    if not isinstance(body, dict):
        raise FileFormatError(f"the file {file} must hold a table of settings.")
    return body
