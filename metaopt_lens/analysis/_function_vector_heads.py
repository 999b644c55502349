"""Heads that carry a function vector, chosen by their effect on some prompts and judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.analysis._head_scores import function_vector_scores
from metaopt_lens.decomposition import decompose
from metaopt_lens.interventions import FunctionVector, function_vector, split_queries
from metaopt_lens.models import wrap
from metaopt_lens.prompts import PromptLike, as_prompts
from metaopt_lens.runs import rank_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class FunctionVectorHeads(Stored):
    """The heads with the largest function-vector scores (arXiv:2310.15213), and the vector they make.

    Attributes:
        heads: by their mean score on the prompts they were chosen on, largest first.
        vector: the sum of their mean outputs on those prompts; ask for its accuracy on the others.
        selection, held_out: the prompts, by number, that heads were chosen on and judged on.
        chosen_scores, held_out_scores: of all heads on either. The mean outputs are those of the first.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "function-vector heads"

    heads: tuple[HeadRef, ...]
    vector: FunctionVector
    selection: Int[Tensor, " selection"]
    held_out: Int[Tensor, " held_out"]
    chosen_scores: Float[Tensor, "selection layer head"]
    held_out_scores: Float[Tensor, "held_out layer head"]
    provenance: dict[str, Any] = field(default_factory=provenance)

    def to_frame(self) -> pd.DataFrame:
        """One row per head: its mean score on the prompts it was chosen on, which flatters it, and on the others."""
        import pandas as pd

        chosen, held_out = self.chosen_scores.mean(0), self.held_out_scores.mean(0)
        return pd.DataFrame(
            {
                "name": [str(ref) for ref in self.heads],
                "chosen": [float(chosen[ref.layer, ref.head]) for ref in self.heads],
                "held_out": [float(held_out[ref.layer, ref.head]) for ref in self.heads],
            }
        )

    def __repr__(self) -> str:
        rows = self.to_frame()
        shown = ", ".join(
            f"{row.name_} {row.held_out:+.3g}" for row in rows.rename(columns={"name": "name_"}).itertuples()
        )
        return (
            f"FunctionVectorHeads of {self.vector.model.name}, chosen on {len(self.selection)} prompts; scores on "
            f"{len(self.held_out)} others: {shown}"
        )


def function_vector_heads(
    model: Any,
    prompts: Sequence[PromptLike],
    n: int = 10,
    *,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> FunctionVectorHeads:
    """Choose the heads of a function vector by their effect: on one half of the prompts, judged on the other.

    A head's score is the gain in the right answer's probability when its output behind shuffled labels is replaced by
    its mean output in context (arXiv:2310.15213; docs/theory.md, section 10).

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: in-context prompts of one task with their labels (see `word_pair_prompts`).
        n: how many heads.
        prepend_bos: put BOS first; None for the model's default.
        seed: of the split and of the shuffled labels.

    Raises:
        OptionError: `n` is not between 1 and the number of heads.
        PromptError: fewer than two prompts, one without a label, or demonstrations of one label only.
    """
    wrapped, parsed = wrap(model), as_prompts(list(prompts))
    n_all = wrapped.info.n_layers * wrapped.info.n_heads
    if not 1 <= n <= n_all:
        raise OptionError(f"n must be between 1 and {n_all}, the heads of {wrapped.info.name}, got {n}.")
    if len(parsed) < 2:
        raise PromptError("one prompt is not enough: heads are chosen on some prompts and judged on others.")
    selection, held_out = split_queries(len(parsed), seed)
    chosen = [parsed[index] for index in selection]
    split = decompose(wrapped, chosen, zero_shot_runs="none", prepend_bos=prepend_bos)
    mean_z = torch.stack([item.z.detach() for item in split]).mean(0)

    def scores(numbers: Sequence[int]) -> Float[Tensor, "query layer head"]:
        rows = [
            function_vector_scores(wrapped, [parsed[i]], mean_z, prepend_bos=prepend_bos, seed=seed + i)
            for i in numbers
        ]
        return torch.cat(rows).double()

    found = scores(selection)
    heads = tuple(rank_heads(found.mean(0), n))
    return FunctionVectorHeads(
        heads=heads,
        vector=function_vector(wrapped, chosen, heads, prepend_bos=prepend_bos),
        selection=torch.tensor(selection),
        held_out=torch.tensor(held_out),
        chosen_scores=found,
        held_out_scores=scores(held_out),
    )
