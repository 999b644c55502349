"""A part read as words: the tokens whose logits it raises and lowers most (docs/theory.md, section 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import HeadError, OptionError
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import read_token

if TYPE_CHECKING:
    import pandas as pd

# A map per layer: `x @ map` stands for what the layers above make of x. Row vectors; TransformerLens's Jacobian lenses
# hold the transpose, ``{layer: lens.jacobians[layer].T}``.
LensMaps = Mapping[int, Tensor] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Word:
    """A token and what a part adds to its logit, the mean over the vocabulary subtracted."""

    token: str
    token_id: int
    value: float


@dataclass(frozen=True, repr=False)
class LensWords:
    """What a part says.

    Attributes:
        name: the part ("meta_gradient of L3H7").
        promoted: tokens it raises most, largest first.
        suppressed: tokens it lowers most, lowest first.
    """

    name: str
    promoted: tuple[Word, ...]
    suppressed: tuple[Word, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per word, from the most promoted to the most suppressed."""
        import pandas as pd

        return pd.DataFrame([vars(word) for word in (*self.promoted, *reversed(self.suppressed))])

    def __repr__(self) -> str:
        lines = [f"{self.name}"]
        for what, words in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            lines.append(f"  {what}: " + ", ".join(f"{word.token!r} {word.value:+.2f}" for word in words))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = (("promotes", self.promoted), ("suppresses", self.suppressed))
        cells = "".join(
            f"<tr><td>{what}</td><td>"
            + " &nbsp; ".join(f"<code>{escape(word.token)}</code> {word.value:+.2f}" for word in words)
            + "</td></tr>"
            for what, words in rows
        )
        return f"<b>{escape(self.name)}</b><table>{cells}</table>"


@dataclass(frozen=True)
class UpdateDirection:
    """A singular direction of a head's weight update.

    Attributes:
        size: its singular value.
        words: what it writes.
        tokens: what it looks for: the demonstrations' tokens whose keys lie along it most, with their projections.
    """

    size: float
    words: LensWords
    tokens: tuple[tuple[str, float], ...]


def read_words(
    model: LensModel,
    vectors: Float[Tensor, "item d_model"],
    names: Sequence[str],
    *,
    layer: int,
    scale: Float[Tensor, ""] | None = None,
    top: int = 10,
    maps: LensMaps | None = None,
) -> list[LensWords]:
    """Vectors of the residual stream read as words, through the final norm's gain and the unembedding.

    Args:
        model: a wrapped model.
        vectors: what is read.
        names: of each, for the result.
        layer: where they are written: which of the `maps` applies.
        scale: of the final norm; None for 1, which leaves the order of words as it is.
        top: how many words on either side.
        maps: a map ``[d_model, d_model]`` per layer, applied as ``vector @ map`` before the final norm; None for the
            plain logit lens, which the identity reproduces.

    Raises:
        OptionError: a map of another width, no map for the layer, or `top` below 1.
    """
    if top < 1:
        raise OptionError(f"top must be at least 1, got {top}.")
    head = model.head
    rows = vectors if maps is None else vectors @ lens_map(model, maps, layer).to(vectors)
    # The part of the norm that is linear: gain, and centring for LayerNorm; its scale is held.
    norm = head.fixed_norm
    if norm is not None:
        rows = rows - rows.mean(-1, keepdim=True) if norm.kind == "LN" else rows
        rows = rows if norm.gain is None else rows * norm.gain.detach().to(rows)
    rows = rows if scale is None else rows / scale.to(rows)
    found = []
    for row, name in zip(rows, names, strict=True):
        values = (row.to(head.w_u.dtype) @ head.w_u.detach()).to(rows.dtype)
        values = values - values.mean()
        found.append(LensWords(name, _words(model, values, top), _words(model, values, top, largest=False)))
    return found


def _words(model: LensModel, values: Tensor, top: int, *, largest: bool = True) -> tuple[Word, ...]:
    best = values.topk(min(top, len(values)), largest=largest)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Word(read_token(token, model.tokenizer), token, value) for token, value in pairs)


def lens_map(model: LensModel, maps: LensMaps, layer: int) -> Float[Tensor, "d_model d_model"]:
    """The map of a layer.

    Args:
        model: a wrapped model. maps: one per layer. layer: which.

    Raises:
        HeadError: the model has no such layer. OptionError: no map for it, or one of another width.
    """
    if not 0 <= layer < model.info.n_layers:
        raise HeadError(f"there is no layer {layer}: the model has layers 0 to {model.info.n_layers - 1}.")
    known = maps.keys() if isinstance(maps, Mapping) else range(len(maps))
    if layer not in known:
        raise OptionError(f"the lens has no map for layer {layer}, only for {sorted(known)}.")
    found, width = maps[layer], model.info.d_model
    if found.shape != (width, width):
        raise OptionError(
            f"the lens of layer {layer} is {list(found.shape)}, but {model.info.name} needs [{width}, {width}]: it was "
            "made for another model."
        )
    return found.detach()
