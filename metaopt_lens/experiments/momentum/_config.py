"""What a training run is: a frozen configuration, read from TOML."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from metaopt_lens._errors import FileFormatError, OptionError
from metaopt_lens.experiments._run_config import read_settings

SHIPPED = ("icl-small", "text-small", "paper-350m")


@dataclass(frozen=True)
class ModelSettings:
    """The transformer: pre-norm, gated MLP, rotary or learned positions, nothing tied.

    Attributes:
        host: ``"bridge"``, a TransformerBridge over transformers' Llama (``"rotary"``) or GPT-2 (``"learned"``);
            ``"native"``, TransformerLens's own model (``TransformerBridge.boot_native``); ``"hooked"``, a
            HookedTransformer (TransformerLens 3.x only).
    """

    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 4
    d_mlp: int = 128
    n_ctx: int = 128
    positions: Literal["rotary", "learned"] = "rotary"
    host: Literal["bridge", "native", "hooked"] = "bridge"


@dataclass(frozen=True)
class MomentumSettings:
    """Momentum attention in every head.

    Attributes:
        eta: 0 is plain attention. Where it is learned, the value it starts from.
        learned: learn one eta per head, kept in [0, 1) by a sigmoid.
        lr_factor: learning rate of the learned etas, relative to that of the weights.
        lags: a control: only this many past tokens are summed, a short convolution instead of an average; 0 for all.
    """

    eta: float = 0.5
    learned: bool = False
    lr_factor: float = 3.0
    lags: int = 0


@dataclass(frozen=True)
class DataSettings:
    """Where the tokens come from.

    Attributes:
        source: ``"synthetic"`` (the bundled in-context tasks: nouns labelled by category, bound anew each time),
            ``"text"`` (a text file, or every text file of a folder), ``"python"`` (the docstrings of this Python's own
            standard library), ``"datasets"`` (a name for Hugging Face's `datasets`).
        path: of the text; name, subset, split, column: of the dataset.
        tokenizer: name or folder of a tokenizer; None for bytes (the synthetic tasks have their own words).
        validation: share of the documents kept for validation (text).
        n_items, n_categories: smallest and largest number in a synthetic sequence.
        curriculum: synthetic: one noun a category until the first fraction of the steps, all from the second on.
    """

    source: Literal["synthetic", "text", "python", "datasets"] = "synthetic"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    tokenizer: str | None = None
    validation: float = 0.1
    n_items: tuple[int, int] = (12, 24)
    n_categories: tuple[int, int] = (2, 4)
    curriculum: tuple[float, float] = (0.1, 0.5)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with warm-up and decay.

    Attributes:
        schedule: ``"cosine"``, or ``"polynomial"`` of degree `power`, from `lr` down to `lr` x `last`.
        precision: ``"float32"``, ``"bfloat16"`` (autocast) or ``"auto"``: bfloat16 on CUDA.
        clip: largest norm of the gradient.
    """

    steps: int = 600
    batch: int = 32
    lr: float = 3e-3
    warmup: int = 50
    schedule: Literal["cosine", "polynomial"] = "cosine"
    power: float = 1.0
    last: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured on held-out data.

    Attributes:
        context_lengths: perplexity of windows of so many tokens; those beyond the context window are refused.
        n_tokens: about how many validation tokens each perplexity uses.
        demos: few-shot accuracy with so many demonstrations (synthetic tasks, or `prompts`).
        n_episodes: prompts per number of demonstrations; categories: of each synthetic prompt.
        prompts: a prompt file for few-shot accuracy of a model with a tokenizer; its demonstrations are cut to `demos`.
        every: also evaluate during training, after so many steps; 0 for the end only.
    """

    context_lengths: tuple[int, ...] = (16, 32, 64)
    n_tokens: int = 8192
    demos: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    n_episodes: int = 256
    categories: int = 2
    prompts: str | None = None
    every: int = 0


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides a training run; equal configurations give equal runs on one machine's CPU.

    Attributes:
        name: of the run, for tables. seed: of weights and data order.
        checkpoint_every: steps between checkpoints.
        note: free text, such as where the numbers are from.
    """

    name: str = "momentum"
    seed: int = 0
    checkpoint_every: int = 200
    note: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    momentum: MomentumSettings = field(default_factory=MomentumSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able data, tables within."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], *, where: str = "the configuration") -> TrainingConfig:
        """The reverse of `to_dict`; what is missing has its default.

        Raises:
            OptionError: an unknown table or field, a value of the wrong kind or out of range; `where` names the place.
        """
        values: dict[str, Any] = {}
        for key, value in body.items():
            table = _TABLES.get(key)
            try:
                if table is None:
                    values |= _fields(cls, {key: value})
                    continue
                entries = _fields(table, value)
                for name, entry in entries.items():
                    _check_choice(key, name, entry)
                values[key] = table(**entries)
            except OptionError as error:
                place = where if table is None else f"{where}, [{key}]"
                raise OptionError(f"{place}: {error}") from None
        try:
            return cls(**values)
        except OptionError as error:
            raise OptionError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingConfig:
        """Read a TOML file, or one of the shipped configurations by its name (`SHIPPED`).

        Raises:
            FileFormatError: the file is missing or no TOML.
            OptionError: see `from_dict`.
        """
        file = Path(path)
        if str(path) in SHIPPED:
            file = Path(__file__).parent / "configs" / f"{path}.toml"
        if not file.is_file():
            raise FileFormatError(f"there is no configuration {path}: give a TOML file or one of {', '.join(SHIPPED)}.")
        return cls.from_dict(read_settings(file), where=str(path))

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with other values; for ``model``, ``momentum``, ... a dict changes fields of the table."""
        merged = {
            key: dataclasses.replace(getattr(self, key), **value) if isinstance(value, dict) else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **merged)

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


_TABLES: dict[str, type[Any]] = {
    "model": ModelSettings,
    "momentum": MomentumSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "evaluation": EvaluationSettings,
}
_CHOICES = {
    "model.positions": ("rotary", "learned"),
    "model.host": ("bridge", "native", "hooked"),
    "data.source": ("synthetic", "text", "python", "datasets"),
    "optimizer.schedule": ("cosine", "polynomial"),
    "optimizer.precision": ("auto", "float32", "bfloat16"),
}


def _fields(table: type[Any], body: Any) -> dict[str, Any]:
    """Values of a table, their kinds checked against the defaults'."""
    if not isinstance(body, Mapping):
        raise OptionError(f"expected a table, got {body!r}.")
    defaults = {f.name: f.default for f in dataclasses.fields(table)}
    values = {}
    for name, value in body.items():
        if name not in defaults:
            raise OptionError(f"there is no field {name!r}; there are {', '.join(defaults)}.")
        values[name] = _of_kind(name, value, defaults[name])
    return values


def _of_kind(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise OptionError(f"{name} must be a list of numbers, got {value!r}.")
        kind: type[Any] = float if any(isinstance(d, float) for d in default) else int
        return tuple(_of_kind(f"an entry of {name}", entry, kind()) for entry in value)
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if good else value
    else:  # a string, or None for no string
        good = isinstance(value, str) or (value is None and default is None)
    if not good:
        what = "a string" if default is None else {bool: "true or false", int: "a whole number"}.get(type(default))
        raise OptionError(f"{name} must be {what or 'a ' + type(default).__name__}, got {value!r}.")
    return value


def _check(config: TrainingConfig) -> None:
    """Raise `OptionError` naming the first value that makes no sense."""
    m, o, d, e = config.model, config.optimizer, config.data, config.evaluation
    _need(0 <= config.momentum.eta < 1, "momentum.eta must be at least 0 and less than 1", config.momentum.eta)
    if config.momentum.learned:
        _need(config.momentum.eta > 0, "a learned eta must start above 0 (momentum.eta)", config.momentum.eta)
    for name, value in (
        *((f"model.{n}", getattr(m, n)) for n in ("n_layers", "d_model", "n_heads", "d_mlp", "n_ctx")),
        *((f"optimizer.{n}", getattr(o, n)) for n in ("steps", "batch")),
        *((f"evaluation.{n}", getattr(e, n)) for n in ("n_tokens", "n_episodes", "categories")),
        ("checkpoint_every", config.checkpoint_every),
    ):
        _need(value >= 1, f"{name} must be at least 1", value)
    for name, value in (
        ("momentum.lags", config.momentum.lags),
        ("optimizer.warmup", o.warmup),
        ("evaluation.every", e.every),
        ("seed", config.seed),
    ):
        _need(value >= 0, f"{name} must not be negative", value)
    for name in ("lr", "clip", "power"):
        value = getattr(o, name)
        _need(math.isfinite(value) and value > 0, f"optimizer.{name} must be positive and finite", value)
    _need(m.d_model % m.n_heads == 0, f"model.d_model must be a multiple of n_heads ({m.n_heads})", m.d_model)
    if m.positions == "rotary":
        _need((m.d_model // m.n_heads) % 2 == 0, "d_model / n_heads must be even for rotary positions", m.d_model)
    _need(0 < d.validation < 1, "data.validation must be between 0 and 1", d.validation)
    for where in _CHOICES:
        table, name = where.split(".")
        _check_choice(table, name, getattr(getattr(config, table), name))
    for name in ("n_items", "n_categories", "curriculum"):
        pair = getattr(d, name)
        _need(len(pair) == 2 and pair[0] <= pair[1], f"data.{name} must be a smallest and a largest value", pair)
    _need(bool(e.context_lengths), "evaluation.context_lengths must name at least one length", e.context_lengths)
    for length in e.context_lengths:
        _need(2 <= length <= m.n_ctx, f"evaluation.context_lengths must be from 2 to n_ctx ({m.n_ctx})", length)
    _need(all(n >= 0 for n in e.demos), "evaluation.demos must not be negative", e.demos)
    _need(d.source != "text" or bool(d.path), "data.source 'text' needs data.path", d.path)
    _need(d.source != "datasets" or bool(d.name), "data.source 'datasets' needs data.name", d.name)
    if d.source == "synthetic":
        longest = 1 + 4 * max(d.n_items[1], max(e.demos, default=0) + 1)
        _need(longest <= m.n_ctx, f"model.n_ctx must hold the longest synthetic sequence ({longest})", m.n_ctx)


def _check_choice(table: str, name: str, value: Any) -> None:
    choices = _CHOICES.get(f"{table}.{name}")
    _need(choices is None or value in choices, f"{table}.{name} must be one of {', '.join(choices or ())}", value)


def _need(good: bool, what: str, came: Any) -> None:
    if not good:
        raise OptionError(f"{what}, got {came!r}.")
