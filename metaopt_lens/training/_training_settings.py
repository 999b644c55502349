"""The tables of a training run's configuration; their values are checked when they are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from metaopt_lens._configuration import Count, Flag, NonNegative, Number, Positive, Whole, settings
from metaopt_lens._errors import OptionError


def _ordered(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    if pair[0] > pair[1]:
        raise ValueError
    return pair


_Range = Annotated[
    tuple[Whole, Whole], AfterValidator(_ordered), Field(description="a smallest and a largest whole number")
]
_Span = Annotated[tuple[Number, Number], AfterValidator(_ordered), Field(description="a smallest and a largest number")]
_Lengths = Annotated[
    tuple[Annotated[Whole, Field(ge=2)], ...],
    Field(min_length=1, description="one or several whole numbers of at least 2"),
]


@settings
class ModelSettings:
    """The transformer: pre-norm, gated MLP, rotary or learned positions, nothing tied.

    Attributes:
        host: ``"bridge"``, a TransformerBridge over transformers' Llama (``"rotary"``) or GPT-2 (``"learned"``);
            ``"native"``, TransformerLens's own model (``TransformerBridge.boot_native``); ``"hooked"``, a
            HookedTransformer (TransformerLens 3.x only).
    """

    n_layers: Count = 2
    d_model: Count = 64
    n_heads: Count = 4
    d_mlp: Count = 128
    n_ctx: Count = 128
    positions: Literal["rotary", "learned"] = "rotary"
    host: Literal["bridge", "native", "hooked"] = "bridge"

    def __post_init__(self) -> None:
        need(self.d_model % self.n_heads == 0, f"d_model must be a multiple of n_heads ({self.n_heads})", self.d_model)
        if self.positions == "rotary":
            odd = (self.d_model // self.n_heads) % 2
            need(not odd, "d_model / n_heads must be even for rotary positions", self.d_model)


@settings
class MomentumSettings:
    """Momentum attention in every head.

    Attributes:
        eta: 0 is plain attention. Where it is learned, the value it starts from.
        learned: learn one eta per head, kept in [0, 1) by a sigmoid.
        lr_factor: learning rate of the learned etas, relative to that of the weights.
        lags: a control: only this many past tokens are summed, a short convolution instead of an average; 0 for all.
    """

    eta: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    learned: Flag = False
    lr_factor: Number = 3.0
    lags: NonNegative = 0

    def __post_init__(self) -> None:
        need(self.eta > 0 or not self.learned, "a learned eta must start above 0", self.eta)


@settings
class DataSettings:
    """Where the tokens come from.

    Attributes:
        source: ``"synthetic"`` (the bundled in-context tasks: nouns labelled by category, bound differently each time),
            ``"text"`` (a text file, or every text file of a folder), ``"python"`` (the docstrings of this Python's own
            standard library), ``"datasets"`` (a name for Hugging Face's `datasets`).
        path: of the text.
        name, subset, split, column: of the dataset.
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
    validation: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    n_items: _Range = (12, 24)
    n_categories: _Range = (2, 4)
    curriculum: _Span = (0.1, 0.5)

    def __post_init__(self) -> None:
        need(self.source != "text" or bool(self.path), "data.source 'text' needs data.path", self.path)
        need(self.source != "datasets" or bool(self.name), "data.source 'datasets' needs data.name", self.name)


@settings
class OptimizerSettings:
    """AdamW with warm-up and decay.

    Attributes:
        schedule: ``"cosine"``, or ``"polynomial"`` of degree `power`, from `lr` down to `lr` x `last`.
        precision: ``"float32"``, ``"bfloat16"`` (autocast) or ``"auto"``: bfloat16 on CUDA.
        clip: largest norm of the gradient.
    """

    steps: Count = 600
    batch: Count = 32
    lr: Positive = 3e-3
    warmup: NonNegative = 50
    schedule: Literal["cosine", "polynomial"] = "cosine"
    power: Positive = 1.0
    last: Number = 0.0
    beta1: Number = 0.9
    beta2: Number = 0.98
    weight_decay: Number = 0.01
    clip: Positive = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"


@settings
class EvaluationSettings:
    """What is measured on held-out data.

    Attributes:
        context_lengths: perplexity of windows of so many tokens; those beyond the context window are refused.
        n_tokens: about how many validation tokens each perplexity uses.
        demos: few-shot accuracy with so many demonstrations (synthetic tasks, or `prompts`).
        n_episodes: prompts per number of demonstrations.
        categories: of each synthetic prompt.
        prompts: a prompt file for few-shot accuracy of a model with a tokenizer; its demonstrations are cut to `demos`.
        every: also evaluate during training, after so many steps; 0 for the end only.
    """

    context_lengths: _Lengths = (16, 32, 64)
    n_tokens: Count = 8192
    demos: tuple[NonNegative, ...] = (0, 1, 2, 4, 8, 16)
    n_episodes: Count = 256
    categories: Count = 2
    prompts: str | None = None
    every: NonNegative = 0


def need(good: bool, what: str, came: Any) -> None:
    """Raise `OptionError` saying what is needed and what came, unless all is good."""
    if not good:
        raise OptionError(f"{what}, got {came!r}.")
