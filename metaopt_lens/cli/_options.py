"""Options that several commands share, how texts on the command line are read, and how a model is loaded from them."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt_lens._errors import OptionError
from metaopt_lens.cli._showing import say


class DType(StrEnum):
    """Floating-point type of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Format(StrEnum):
    """What goes to the terminal."""

    table = "table"
    json = "json"


class Variant(StrEnum):
    """Form of the published templates."""

    published = "published"
    one_line = "one-line"


class Controls(StrEnum):
    """What similarities are compared with."""

    quick = "quick"
    standard = "standard"
    sceptic = "sceptic"


class Labels(StrEnum):
    """Label words of the demonstrations."""

    natural = "natural"
    flipped = "flipped"
    neutral = "neutral"


class Selection(StrEnum):
    """How demonstrations are chosen."""

    random = "random"
    balanced = "balanced"
    nearest = "nearest"


MODEL = typer.Option(
    "--model",
    help="A GGUF file, a local folder, a name on the hub, 'smollm2' or 'gemma3-270m' from packages, or 'tiny' for the "
    "bundled model.",
)
DTYPE = typer.Option("--dtype", help="Floating-point type of the weights (default float32).")
LR = typer.Option("--lr", help="Learning rate, or 'auto' (default) to choose it on held-out demonstrations.")
Model = Annotated[str, MODEL]
MaybeModel = Annotated[str | None, MODEL]
WeightsType = Annotated[DType, DTYPE]
MaybeWeightsType = Annotated[DType | None, DTYPE]
Device = Annotated[str | None, typer.Option("--device", help="Where to run, such as cpu or cuda.")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Convert a GGUF file each time, and keep nothing in the cache.")
]
PrependBos = Annotated[
    bool | None,
    typer.Option("--prepend-bos/--no-prepend-bos", help="Put BOS first; by default as the model does."),
]
Form = Annotated[Format, typer.Option("--format", help="What goes to the terminal.")]
Rate = Annotated[str, LR]
MaybeRate = Annotated[str | None, LR]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Sequences run together (default: by memory).")
]
ControlsPreset = Annotated[
    Controls | None,
    typer.Option(
        "--controls",
        help="What similarities are compared with: random directions and other queries (quick); also shuffled and "
        "flipped labels, unrelated text and finetuning uphill (standard, default); also permuted weights, more "
        "shuffles, and what any update could do, several times as long (sceptic).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of shuffles, random draws and intervals.")]
Top = Annotated[int, typer.Option("--top", min=1, help="How many heads the table lists.")]
Recompute = Annotated[
    bool, typer.Option("--recompute-damaged", help="Recompute damaged pieces instead of refusing them.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of torch (default: its own choice; 1 for small models).")
]
Eta = Annotated[float | None, typer.Option("--eta", help="Instead of the configuration's eta; 0 is plain attention.")]
Learned = Annotated[bool, typer.Option("--learned", help="Learn one eta per head.")]
Lags = Annotated[int | None, typer.Option("--lags", min=1, help="A control: sum only so many past tokens' values.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Instead of the configuration's number of steps.")]


def load(model: str, dtype: DType, device: str | None, *, no_cache: bool) -> Any:
    """The model that the options name, wrapped. A hub that cannot be reached is one error at the end."""
    import torch

    from metaopt_lens.models import load_model, wrap

    quiet_hub()
    if sys.stderr.isatty():
        say(f"loading {model} ...", to_stderr=True)
    return wrap(load_model(model, dtype=getattr(torch, dtype.value), device=device, cache=not no_cache))


def quiet_hub() -> None:
    """No line of the hub's own for every retry."""
    import logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def learning_rate(text: str) -> Any:
    """A number, or "auto"."""
    return text if text == "auto" else _number(text, float, "--lr must be a number or 'auto'")


def position(text: str) -> Any:
    """A token index, "last" or "all"."""
    return text if text in {"last", "all"} else _number(text, int, "--position must be last, all or a token index")


def seeds(text: str) -> Any:
    """How many seeds, or a list of them."""
    what = "--seeds must be a number or numbers with commas between"
    numbers = [_number(part, int, what, given=text) for part in text.split(",")]
    return numbers if "," in text else numbers[0]


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--unrelated {path} cannot be read as text ({error}).") from None
    return [line for line in found if line]


def _number(text: str, kind: type[int] | type[float], what: str, *, given: str | None = None) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise OptionError(f"{what}, got {given or text!r}.") from None
