"""What one destination of an in-context run says: as logits of an answer, as words (docs/theory.md, section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metaopt_lens._errors import OptionError
from metaopt_lens._types import HeadRef
from metaopt_lens.decomposition._answer_tokens import Answer, Target, answer_targets
from metaopt_lens.decomposition._direct_logits import kept_stream, logit_contributions, run_through_answer
from metaopt_lens.decomposition._lens_parts import (
    check_part,
    final_scale,
    head_or_layer,
    part_in_z,
    singular_directions,
    written,
)
from metaopt_lens.decomposition._lens_words import LensMaps, LensWords, UpdateDirection, read_words
from metaopt_lens.decomposition._logit_contributions import LogitContributions
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt
from metaopt_lens.runs import Run

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


def read_logits(
    model: LensModel, prompt: ICLPrompt, run: Run, answer: Answer | None, versus: Answer | Sequence[Answer] | None
) -> LogitContributions:
    """See `Decomposition.logits`; the run has one destination."""
    targets = answer_targets(model, prompt, answer, versus)
    if len(targets) == 1:
        return logit_contributions(model, run, targets)
    _require_end(run, targets)
    return logit_contributions(model, run_through_answer(model, run, targets), targets)


def read_along(
    model: LensModel,
    prompt: ICLPrompt,
    run: Run,
    answer: Answer | None,
    versus: Answer | Sequence[Answer] | None,
    *,
    n_before: int,
) -> tuple[Run, LogitContributions]:
    """An answer's logits token by token, and that of its first token at tokens of the query, too.

    Args:
        model: a wrapped model, in the state the run was made in.
        prompt: gives template, label and candidates.
        run: an in-context run that was read at the prompt's last token.
        answer: see `Decomposition.logits`.
        versus: the rivals.
        n_before: how many tokens of the query, before its last.

    Returns:
        The run, with one destination for each reading, in order; and its contributions.

    Raises:
        ModelMismatchError: the model now computes something else on the prompt.
    """
    targets = answer_targets(model, prompt, answer, versus)
    _require_end(run, targets)
    longer = run_through_answer(model, run, targets, n_before=n_before)
    return longer, logit_contributions(model, longer, [targets[0]] * n_before + list(targets))


def _require_end(run: Run, targets: Sequence[Target]) -> None:
    (at,) = run.destinations
    if at != run.tokens.n_tokens - 1:
        raise OptionError(
            f"an answer of {len(targets)} tokens is read behind the whole prompt, not at position {at}: name its first "
            "token alone."
        )


def read_part(
    model: LensModel,
    run: Run,
    head: str | HeadRef | tuple[int, int] | None,
    part: str,
    *,
    layer: int | None,
    demo: int | None,
    top: int,
    maps: LensMaps | None,
) -> LensWords:
    """See `Decomposition.lens`; the run has one destination."""
    check_part(part, demo, len(run.tokens.demos))
    at, heads = head_or_layer(head, layer, model)
    of = f"layer {at}" if head is None else str(HeadRef(at, heads[0]))
    if part == "mlp":
        if head is not None:
            raise OptionError(f"an MLP belongs to a layer: lens(part='mlp', layer={at}).")
        vector = kept_stream(run).mlp[0, at].detach()
    else:
        span = None if demo is None else run.tokens.demos[demo]
        vector = written(model, run, at, heads, part_in_z(run, part, span)[0, at, heads].detach())
    name = f"{part} of {of}" + ("" if demo is None else f", demonstration {demo}")
    return read_words(model, vector[None], [name], layer=at, scale=final_scale(model, run), top=top, maps=maps)[0]


def read_update(
    model: LensModel,
    run: Run,
    update: FactoredMatrix,
    layer: int,
    head: int,
    *,
    k: int,
    top: int,
    maps: LensMaps | None,
) -> tuple[UpdateDirection, ...]:
    """See `Decomposition.lens_update`; `update` is the head's dW_ICL in the run."""
    left, sizes, right = singular_directions(update, k)
    demos, kv_head = run.tokens.demonstrations, head // (model.info.n_heads // model.info.n_kv_heads)
    keys = run.k_of(layer)[demos.slice, kv_head].detach().to(right)
    found = []
    for index, size in enumerate(sizes.tolist()):
        vector = written(model, run, layer, [head], left[:, index][None])
        name = f"direction {index} of dW_ICL of {HeadRef(layer, head)}"
        (words,) = read_words(model, vector[None], [name], layer=layer, top=top, maps=maps)
        along = keys @ right[:, index]
        best = along.abs().topk(min(top, len(along))).indices.tolist()
        tokens = tuple((run.tokens.tokens[demos.start + i], float(along[i])) for i in best)
        found.append(UpdateDirection(size, words, tokens))
    return tuple(found)
