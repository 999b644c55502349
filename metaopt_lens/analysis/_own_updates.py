"""Updates that `compare` makes itself: one finetuning per demonstration set, and those on unrelated texts."""

from __future__ import annotations

import random
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaopt_lens._errors import NonFiniteError, OptionError, PromptError
from metaopt_lens.analysis._compare_options import Controls, Finetuning
from metaopt_lens.analysis._controls import unrelated_update, uphill_update
from metaopt_lens.analysis._measuring import timed
from metaopt_lens.analysis._null_names import UNRELATED_TEXT, UPHILL
from metaopt_lens.finetuning import LearningRateChoice, WeightUpdate, choose_learning_rate, finetune
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt
from metaopt_lens.runs import tokenize_for

# Our own plain sentences, about nothing a usual task is about.
UNRELATED_TEXTS = (
    "The ferry leaves the harbour at seven and comes back before dark.",
    "She folded the map twice and put it under the lamp.",
    "Copper pipes were laid along the northern wall of the cellar.",
    "After the rain the path to the quarry was closed for a week.",
    "He counted the steps to the bridge and wrote the number down.",
    "The second drawer holds string, a ruler and two old keys.",
    "Nobody had wound the clock since the end of March.",
    "A row of poplars stands between the field and the railway.",
)
_HELD_OUT_SHARE = 4  # one demonstration in four judges the learning rate


@dataclass(frozen=True, eq=False)
class OwnUpdates:
    """One finetuning per demonstration set.

    Attributes:
        updates: in the order of the sets.
        choice: how the learning rate was chosen; None where it was given.
    """

    updates: tuple[WeightUpdate, ...]
    choice: LearningRateChoice | None


def finetune_sets(
    model: LensModel, firsts: Sequence[ICLPrompt], how: Finetuning, *, prepend_bos: bool | None, allow_processed: bool
) -> OwnUpdates:
    """Choose a learning rate on the first set, unless it is given, and finetune on every set.

    Args:
        model: never modified.
        firsts: a prompt of every set.
        how: to finetune.
        prepend_bos: put BOS first; None for the model's default.
        allow_processed: accept a model with folded norms or biases.

    Raises:
        PromptError: too few demonstrations to hold any out for the learning rate.
        NonFiniteError: every learning rate diverged, or the one given.
    """
    options: dict[str, Any] = {**how.arguments, "prepend_bos": prepend_bos, "allow_processed": allow_processed}
    choice = _choose(model, firsts[0], options) if how.lr == "auto" else None
    rate = float(how.lr) if choice is None else choice.lr
    options = {"keep_factors": True, "progress": False, **options}
    return OwnUpdates(tuple(finetune(model, prompt, lr=rate, **options) for prompt in firsts), choice)


def _choose(model: LensModel, prompt: ICLPrompt, options: dict[str, Any]) -> LearningRateChoice:
    n_held_out = len(prompt.demos) // _HELD_OUT_SHARE
    if n_held_out == 0:
        raise PromptError(
            f"choosing a learning rate holds out one demonstration in {_HELD_OUT_SHARE}, but there are only "
            f"{len(prompt.demos)}: give more, or a learning rate."
        )
    train, held_out = prompt.demos[:-n_held_out], prompt.demos[-n_held_out:]
    return choose_learning_rate(
        model, train, held_out, template=prompt.template, candidates=prompt.candidates, **options
    )


def text_updates(
    model: LensModel,
    firsts: Sequence[ICLPrompt],
    updates: Sequence[WeightUpdate],
    controls: Controls,
    seconds: MutableMapping[str, float],
) -> tuple[dict[str, list[WeightUpdate]], list[str]]:
    """Finetune on the controls' texts in the way of the sets' updates, and scale to their norms.

    Args:
        model: never modified.
        firsts: a prompt of every set.
        updates: of every set.
        controls: whose texts are used.
        seconds: that each took, by name; filled in.

    Returns:
        Updates of every set by the control's name, and a note for each control that could not be made.

    Raises:
        OptionError: texts for another number of sets.
    """
    texts: Mapping[str, Sequence[str] | Sequence[Sequence[str]]] = controls.texts
    if controls.unrelated_text and UNRELATED_TEXT not in texts:
        texts = {UNRELATED_TEXT: default_unrelated_texts(model, firsts[0]), **texts}
    found: dict[str, list[WeightUpdate]] = {}
    notes = []
    for name, lines in texts.items():
        pairs = zip(_per_set(lines, len(firsts), name), updates, strict=True)
        try:
            with timed(seconds, name):
                found[name] = [unrelated_update(model, own, like=update) for own, update in pairs]
        except (PromptError, OptionError, NonFiniteError) as error:
            notes.append(f"the control {name!r} is left out ({error})")
    return found, notes


def uphill_updates(
    model: LensModel, firsts: Sequence[ICLPrompt], updates: Sequence[WeightUpdate], *, prepend_bos: bool | None
) -> tuple[dict[str, list[WeightUpdate]], list[str]]:
    """The sets' finetunings uphill, by the control's name; nothing, and a note, where that is not possible.

    Args:
        model: never modified.
        firsts: a prompt of every set.
        updates: of every set.
        prepend_bos: put BOS first; None for the model's default.
    """
    pairs = zip(firsts, updates, strict=True)
    try:
        return {UPHILL: [uphill_update(model, p, like=u, prepend_bos=prepend_bos) for p, u in pairs]}, []
    except NonFiniteError as error:
        rates = sorted({f"{u.settings.lr:g}" for u in updates if u.settings is not None})
        return {}, [f"the control {UPHILL!r} is left out: uphill, learning rate {', '.join(rates)} diverges ({error})"]
    except OptionError as error:
        return {}, [f"the control {UPHILL!r} is left out ({error})"]


def _per_set(lines: Sequence[str] | Sequence[Sequence[str]], n_sets: int, name: str) -> list[list[str]]:
    """One list of texts for each set."""
    own = [list(found) for found in lines if not isinstance(found, str)]
    shared = [text for text in lines if isinstance(text, str)]
    if len(own) not in (0, n_sets) or (own and shared) or not (own or shared):
        raise OptionError(
            f"the texts of {name!r} must be one list of texts, or one list for each of the {n_sets} sets."
        )
    return own or [shared] * n_sets


def default_unrelated_texts(model: LensModel, prompt: ICLPrompt) -> list[str]:
    """Our own sentences, or words of the demonstrations in random order where the tokenizer does not know those.

    Args:
        model: a wrapped model.
        prompt: whose words are used.
    """
    try:
        for text in UNRELATED_TEXTS:
            tokenize_for(model, ICLPrompt((), text), check_window=False)
    except PromptError:
        words = sorted({word for demo in prompt.demos for word in demo.input.split()})
        rng = random.Random(0)
        return [" ".join(rng.choices(words, k=4)) for _ in range(len(prompt.demos))]
    return list(UNRELATED_TEXTS)
