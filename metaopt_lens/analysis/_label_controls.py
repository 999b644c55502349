"""Runs behind demonstrations with shuffled or flipped labels: the prompts, and what is answered after learning them."""

from __future__ import annotations

from collections.abc import Sequence

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._controls import finetune_arguments, flip_labels, shuffle_labels
from metaopt_lens.analysis._label_answers import Answers, Choices
from metaopt_lens.analysis._null_names import FLIPPED_LABELS, SHUFFLED_LABELS
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt
from metaopt_lens.runs import run_shared_prefix


def moved_labels(
    prompts: Sequence[ICLPrompt], *, shuffled: bool, flipped: bool, seeds: Sequence[int]
) -> dict[str, list[list[ICLPrompt]]]:
    """The prompts of one set under each control, one list a draw; nothing where all demonstrations have one label.

    Args:
        prompts: with the same demonstrations.
        shuffled: one draw for each seed.
        flipped: one draw.
        seeds: of the draws.
    """
    if len({demo.label for demo in prompts[0].demos}) < 2:
        return {}
    found = {}
    if shuffled:
        found[SHUFFLED_LABELS] = [[shuffle_labels(p, seed=seed) for p in prompts] for seed in seeds]
    if flipped:
        found[FLIPPED_LABELS] = [[flip_labels(p, seed=seeds[0]) for p in prompts]]
    return found


def finetuned_answers(
    model: LensModel,
    prompt: ICLPrompt,
    tokens: TokenizedPrompt,
    like: WeightUpdate,
    choices: Choices,
    *,
    prepend_bos: bool | None,
    batch_size: int | None,
) -> Answers | None:
    """What is answered zero-shot after finetuning on a control's demonstrations; None where `like` says not how.

    Args:
        model: never modified.
        prompt: the first of the control's prompts.
        tokens: of a prompt of the set, for what stands before the demonstrations.
        like: the update whose settings are used.
        choices: of the set's queries.
        prepend_bos: as for the prompts.
        batch_size: queries run together.
    """
    try:
        arguments = finetune_arguments(like)
    except OptionError:
        return None
    update = finetune(model, prompt, prepend_bos=prepend_bos, progress=False, allow_processed=True, **arguments)
    with update.applied(model):
        prefix = run_shared_prefix(model, tokens.ids[: tokens.demonstrations.start])
        return choices.answers(model, prefix, batch_size=batch_size)
