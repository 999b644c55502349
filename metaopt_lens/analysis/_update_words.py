"""What a finetuning update says: dW_FT q of a head, and its change of W_V as a whole, read as words."""

from __future__ import annotations

import torch

from metaopt_lens._errors import OptionError
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition import Decomposition, LensMaps, LensWords, read_words, written
from metaopt_lens.finetuning import WeightUpdate, delta_w_ft, updated_memory
from metaopt_lens.runs import Keep, record


def finetuning_words(
    result: Decomposition,
    update: WeightUpdate,
    head: str | HeadRef | tuple[int, int],
    *,
    top: int = 10,
    maps: LensMaps | None = None,
) -> LensWords:
    """The words that ``dW_FT q`` of a head promotes: what finetuning adds in the linear form, for this query.

    Args:
        result: the decomposition of a prompt, read at its last token.
        update: what finetuning did.
        head: which.
        top: how many words on either side.
        maps: see `Decomposition.lens`.

    Raises:
        HeadError: a head that the model does not have.
        ModelMismatchError: an update of another model, or a result without its model.
    """
    model = result.required_source("words")
    model.check_same(update.model, "this update")
    ref = HeadRef.of(head).check(model.info.n_layers, model.info.n_heads)
    run = result.runs.icl
    (base,) = record(model, [run.tokens], settings=("zs_matched",), keep=Keep(own_stream=True))
    (memory,) = updated_memory(model, update, [base.zs_matched])
    seen = run.visible[ref.layer, -1, ~run.in_demos]
    kv_head = ref.head // (model.info.n_heads // model.info.n_kv_heads)
    change = delta_w_ft(memory, ref.layer, seen)[kv_head]
    added = change.A.detach() @ (change.B.detach() @ run.q[-1, ref.layer, ref.head].to(change.B).detach())
    vector = written(model, run, ref.layer, [ref.head], added[None])
    (words,) = read_words(model, vector[None], [f"dW_FT q of {ref}"], layer=ref.layer, top=top, maps=maps)
    return words


def value_update_words(
    result: Decomposition,
    update: WeightUpdate,
    head: str | HeadRef | tuple[int, int],
    *,
    k: int = 3,
    top: int = 10,
    maps: LensMaps | None = None,
) -> tuple[tuple[float, LensWords, LensWords], ...]:
    """A head's change of W_V as words: for each leading singular direction its size, what it reads, what it writes.

    ``x -> x dW_V W_O``: the left directions are in the residual stream that the head reads, the right ones become words
    through W_O.

    Args:
        result: a decomposition on the model; it holds the scale of a norm after attention.
        update: what finetuning did.
        head: which; heads that share a value projection have the same change of it.
        k: how many directions.
        top: how many words on either side.
        maps: see `Decomposition.lens`; applied to what is written.

    Raises:
        OptionError: the update leaves W_V as it is.
        HeadError: a head that the model does not have.
        ModelMismatchError: an update of another model, or a result without its model.
    """
    model = result.required_source("words")
    model.check_same(update.model, "this update")
    ref = HeadRef.of(head).check(model.info.n_layers, model.info.n_heads)
    if update.w_v is None:
        raise OptionError("this update leaves W_V as it is: finetune with targets that include 'v'.")
    kv_head = ref.head // (model.info.n_heads // model.info.n_kv_heads)
    u, s, vh = torch.linalg.svd(update.w_v[ref.layer, kv_head].float(), full_matrices=False)
    found = []
    for index, size in enumerate(s[:k].tolist()):
        out = written(model, result.runs.icl, ref.layer, [ref.head], vh[index][None])
        about = f"direction {index} of dW_V of {ref}"
        (reads,) = read_words(model, u[:, index][None], [f"{about}: reads"], layer=ref.layer, top=top)
        (writes,) = read_words(model, out[None], [f"{about}: writes"], layer=ref.layer, top=top, maps=maps)
        found.append((size, reads, writes))
    return tuple(found)
