"""Which heads to show."""

from __future__ import annotations

from collections.abc import Sequence

from metaopt_lens._errors import OptionError
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Decomposition, DecompositionSet
from metaopt_lens.viz._table import decompositions

N_STRONGEST = 4


def choose_heads(
    result: Decomposition | DecompositionSet, heads: Sequence[str | HeadRef | tuple[int, int]] | None = None
) -> list[HeadRef]:
    """The heads asked for, checked, without repeats; by default the first four of `heads()`.

    Args:
        result: what `decompose` returned.
        heads: heads such as ``"L3H7"``; None for the first four.

    Raises:
        HeadError: a head that the model does not have, or a name that cannot be read.
        OptionError: an empty list.
    """
    first = decompositions(result)[0]
    if heads is None:
        return result.heads(N_STRONGEST)
    wanted = [heads] if isinstance(heads, str) else list(heads)
    if not wanted:
        raise OptionError("no heads to show: name at least one, as in ['L3H7'], or leave it out for the strongest.")
    refs = [HeadRef.of(h) for h in wanted]
    return list(dict.fromkeys(ref.check(first.model.n_layers, first.model.n_heads) for ref in refs))
