"""The demonstration sets of a comparison: their prompts, updates and controls, checked before anything is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from metaopt_lens._errors import ModelMismatchError, OptionError, PromptError
from metaopt_lens.analysis._null_names import RESERVED
from metaopt_lens.analysis._training_attention import usable_factors
from metaopt_lens.finetuning import WeightUpdate, demonstration_ids
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt
from metaopt_lens.runs import prompt_groups, tokenize_all

Updates = WeightUpdate | Sequence[WeightUpdate]


@dataclass(frozen=True, eq=False)
class DemoSet:
    """The queries behind one set of demonstrations.

    Attributes:
        indices: where its prompts stood among all.
        prompts: the queries.
        tokenized: the same as tokens.
    """

    indices: list[int]
    prompts: list[ICLPrompt]
    tokenized: list[TokenizedPrompt]


@dataclass(frozen=True, eq=False)
class TrainedSet(DemoSet):
    """A demonstration set with what finetuning did.

    Attributes:
        update: of finetuning on the demonstrations.
        controls: other updates by name.
    """

    update: WeightUpdate
    controls: dict[str, WeightUpdate]


def group_sets(model: LensModel, prompts: Sequence[ICLPrompt], *, prepend_bos: bool | None) -> list[DemoSet]:
    """Group prompts by their demonstrations.

    Args:
        model: a wrapped model.
        prompts: all queries.
        prepend_bos: put BOS first; None for the model's default.

    Raises:
        PromptError: a prompt without demonstrations, or a set of a single query.
    """
    tokenized = tokenize_all(model, prompts, prepend_bos=prepend_bos, require_demos=True)
    groups = prompt_groups(tokenized)
    for index, group in enumerate(groups):
        if len(group) < 2:
            raise PromptError(
                f"demonstration set {index} has a single query; the other-query null needs at least two behind the "
                "same demonstrations."
            )
    return [DemoSet(group, [prompts[i] for i in group], [tokenized[i] for i in group]) for group in groups]


def check_names(controls: Iterable[str]) -> None:
    """Raise `OptionError` if a user's control has the name of another null.

    Args:
        controls: their names.
    """
    taken = sorted(RESERVED.intersection(controls))
    if taken:
        raise OptionError(f"the control {taken[0]!r} has the name of another null: give it a name of its own.")


def with_updates(
    model: LensModel,
    sets: Sequence[DemoSet],
    update: Updates,
    controls: Mapping[str, Updates],
    *,
    allow_other_training: bool,
) -> list[TrainedSet]:
    """Give each set its update and controls.

    Args:
        model: a wrapped model.
        sets: in the order of their first prompts.
        update: one per set.
        controls: by name, one per set.
        allow_other_training: accept updates that were trained on something else.

    Raises:
        OptionError: another number of updates.
        ModelMismatchError: an update of another model, of neither keys nor values, or trained on something else.
    """
    updates = _per_set(update, len(sets), "update")
    lists = {name: _per_set(value, len(sets), f"control {name!r}") for name, value in controls.items()}
    for name, found in (("update", updates), *lists.items()):
        for item in found:
            model.check_same(item.model, f"the {name}")
            if item.w_k is None and item.w_v is None:
                raise ModelMismatchError(f"the {name} changes neither keys nor values, which the linear form compares.")
    trained = []
    for number, group in enumerate(sets):
        own = {name: found[number] for name, found in lists.items()}
        trained.append(TrainedSet(group.indices, group.prompts, group.tokenized, updates[number], own))
    return _check_training(trained, allow_other=allow_other_training)


def _per_set(value: Updates, n_sets: int, what: str) -> list[WeightUpdate]:
    found = [value] if isinstance(value, WeightUpdate) else list(value)
    if len(found) != n_sets:
        raise OptionError(
            f"there are {n_sets} demonstration sets, so {what} must be {n_sets} weight updates, in the order of the "
            f"sets' first prompts; got {len(found)}."
        )
    return found


def _check_training(sets: list[TrainedSet], *, allow_other: bool) -> list[TrainedSet]:
    """Every update must have learned its own set's demonstrations; one that does not say what it learned passes.

    With `allow_other` others pass without their factors: attention to training tokens is that to the demonstrations.
    """
    wanted = [demonstration_ids(group.tokenized[0]) for group in sets]
    checked = []
    for index, group in enumerate(sets):
        found = group.update.trained_on
        if found is None or found == wanted[index]:
            checked.append(group)
        elif allow_other:
            checked.append(dataclasses.replace(group, update=dataclasses.replace(group.update, factors=None)))
        else:
            if found in wanted:
                what = (
                    f"on those of set {wanted.index(found)}: give the updates in the order of the sets' first prompts"
                )
            elif _without_first(wanted[index]) == found or _without_first(found) == wanted[index]:
                what = "on the same with another choice of BOS: give both the same prepend_bos"
            else:
                what = "on other tokens: finetune on the set's own prompt, or pass allow_other_training=True"
            raise ModelMismatchError(
                f"the update of set {index} was not trained on the demonstrations of set {index} (first query "
                f"{group.prompts[0].query!r}), but {what}."
            )
    return checked


def _without_first(sequences: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(ids[1:] for ids in sequences)


def choose_top_k(sets: list[TrainedSet], given: int | None) -> dict[str, int]:
    """How many entries count as top, the same for all sets; half of what the smallest set has where that is less.

    Args:
        sets: all of them.
        given: at token level; None for at most 100.

    Raises:
        OptionError: more than there are tokens.
    """
    firsts = [group.tokenized[0] for group in sets]
    spans = [zip(t.demos, t.labels, strict=True) for t in firsts]  # separators are not counted
    tokens = min(sum(label.stop - demo.start for demo, label in pairs) for pairs in spans)
    if given is not None and any(usable_factors(group.update) for group in sets) and not 1 <= given <= tokens:
        raise OptionError(f"top_k must be from 1 to the {tokens} demonstration tokens there are, got {given}.")
    demos = min(len(t.demos) for t in firsts)
    return {"token": given or min(100, max(1, tokens // 2)), "example": min(5, max(1, demos // 2))}
