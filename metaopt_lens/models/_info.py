"""Names and sizes of a model, stored with every result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metaopt_lens._codec import NOT_IN_0_1
from metaopt_lens._errors import ContextWindowError, ModelMismatchError


@dataclass(frozen=True)
class ModelInfo:
    """Names and sizes of a wrapped model.

    Attributes:
        name: as TransformerLens knows it.
        host: which of TransformerLens's classes it is.
        architecture: transformers' name of the architecture, or TransformerLens's own.
        n_layers: blocks.
        n_heads: query heads of a layer.
        n_kv_heads: key-value heads of a layer.
        d_model: width of the residual stream.
        d_head: size of one head.
        d_vocab: size of the vocabulary.
        n_ctx: longest sequence.
        dtype: of the weights.
        positions: how positions enter: `"learned"`, `"rotary"`, `"alibi"` or `"none"`.
        processing: what weight processing was found (`"folded norms"`, `"folded value biases"`); empty for raw weights.
        quantization: what the weights were de-quantised from, such as `"Q4_1 GGUF"`; `"none"` if not at all.
    """

    name: str
    host: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    dtype: str
    positions: str
    processing: tuple[str, ...] = ()
    quantization: str = field(default="none", metadata=NOT_IN_0_1)

    @classmethod
    def of_config(cls, cfg: Any, **facts: Any) -> ModelInfo:
        """Name and sizes out of TransformerLens's configuration, which is the same for all its classes.

        Args:
            cfg: the model's ``cfg``.
            facts: the attributes that are not a name or a size.
        """
        return cls(
            name=str(cfg.model_name),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            **facts,
        )

    @property
    def is_processed(self) -> bool:
        """Whether weights were folded, which changes the split (docs/theory.md, section 1)."""
        return bool(self.processing)

    @property
    def weights(self) -> str:
        """What was done to the weights, in words."""
        done = " and ".join(self.processing) if self.is_processed else "as trained"
        return done if self.quantization == "none" else f"{done}, de-quantised from {self.quantization}"

    def check_window(self, n_tokens: int, what: str) -> None:
        """Raise `ContextWindowError` if `n_tokens` do not fit the context window.

        Args:
            n_tokens: length of the prompt.
            what: what errors call it.
        """
        if n_tokens > self.n_ctx:
            raise ContextWindowError(
                f"{what} has {n_tokens} tokens, but the context window of {self.name} is {self.n_ctx}."
            )

    def check_same(self, other: ModelInfo, what: str) -> None:
        """Raise `ModelMismatchError` unless `other` has this model's sizes and parametrisation.

        Args:
            other: the model that something was made with.
            what: what errors call it.
        """
        for size in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "processing"):
            mine, theirs = getattr(self, size), getattr(other, size)
            if mine != theirs:
                raise ModelMismatchError(
                    f"{what} was made with {other.name} ({size} = {theirs}); {self.name} has {size} = {mine}."
                )

    def __str__(self) -> str:
        weights = f"weights with {' and '.join(self.processing)}" if self.processing else "raw weights"
        weights += "" if self.quantization == "none" else f" de-quantised from {self.quantization}"
        grouped = f", {self.n_kv_heads} key-value heads" if self.n_kv_heads != self.n_heads else ""
        return (
            f"{self.name!r}: {self.host}, {self.architecture}, {self.n_layers} layers x {self.n_heads} heads"
            f"{grouped}, d_head {self.d_head}, {self.positions} positions, {self.dtype}, {weights}"
        )


def dtype_name(dtype: Any) -> str:
    """`"float32"` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
