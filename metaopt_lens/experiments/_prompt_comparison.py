"""From prompts to a comparison in one call: finetune on every demonstration set, add controls, compare."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from metaopt_lens._errors import PromptError
from metaopt_lens.analysis import Comparison, compare, unrelated_update
from metaopt_lens.finetuning import LearningRateChoice, WeightUpdate, choose_learning_rate, finetune
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.models.tiny import CATEGORIES, CATEGORY_OF, Episode
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


@dataclass(frozen=True)
class PromptComparison:
    """A comparison with what went into it: the update of every demonstration set, and how the rate was chosen."""

    comparison: Comparison
    updates: tuple[WeightUpdate, ...]
    learning_rate: LearningRateChoice | None


def compare_prompts(
    model: Any,
    prompts: Sequence[ICLPrompt],
    *,
    lr: float | Literal["auto"] = "auto",
    unrelated_texts: Sequence[str] | None = None,
    finetuning: dict[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> PromptComparison:
    """Finetune on the demonstrations of every set and compare (see `compare` for what comes out).

    Args:
        prompts: at least two queries behind each set of demonstrations.
        lr: learning rate; ``"auto"`` chooses it on a quarter of the first set's demonstrations, held out for that.
        unrelated_texts: for the control that finetunes on something else; by default sentences of our own, or words of
            the demonstrations in random order where the tokenizer does not know those; an empty list for none.
        finetuning: further arguments of `finetune`. options: further arguments of `compare`.

    Raises:
        PromptError: too few demonstrations to hold any out for the learning rate.
    """
    wrapped = wrap(model)
    allowed = bool(options.get("allow_processed"))
    settings: dict[str, Any] = {
        "keep_factors": True,
        "progress": progress,
        "allow_processed": allowed,
        **(finetuning or {}),
    }
    sets = list({prompt.demos: prompt for prompt in prompts}.values())
    choice = None
    if lr == "auto":
        choice = _choose(wrapped, sets[0], finetuning or {}, allow_processed=allowed)
    rate = choice.lr if choice is not None else float(lr)
    updates = [finetune(wrapped, prompt, lr=rate, **settings) for prompt in sets]
    texts = default_unrelated_texts(wrapped, sets[0]) if unrelated_texts is None else list(unrelated_texts)
    controls = {}
    if texts:
        controls["unrelated text"] = [unrelated_update(wrapped, texts, like=update) for update in updates]
    result = compare(wrapped, prompts, updates, controls=controls, progress=progress, **options)
    return PromptComparison(result, tuple(updates), choice)


def _choose(
    model: LensModel, prompt: ICLPrompt, finetuning: dict[str, Any], *, allow_processed: bool
) -> LearningRateChoice:
    n_held_out = len(prompt.demos) // _HELD_OUT_SHARE
    if n_held_out == 0:
        raise PromptError(
            f"choosing a learning rate holds out one demonstration in {_HELD_OUT_SHARE}, but there are only "
            f"{len(prompt.demos)}: give more, or a learning rate."
        )
    train, held_out = prompt.demos[:-n_held_out], prompt.demos[-n_held_out:]
    return choose_learning_rate(
        model,
        train,
        held_out,
        template=prompt.template,
        candidates=prompt.candidates,
        allow_processed=allow_processed,
        **finetuning,
    )


def default_unrelated_texts(model: LensModel, prompt: ICLPrompt) -> list[str]:
    """Our own sentences, or words of the demonstrations in random order where the tokenizer does not know those."""
    try:
        for text in UNRELATED_TEXTS:
            tokenize_for(model, ICLPrompt((), text), check_window=False)
    except PromptError:
        words = sorted({word for demo in prompt.demos for word in demo.input.split()})
        rng = random.Random(0)
        return [" ".join(rng.choices(words, k=4)) for _ in range(len(prompt.demos))]
    return list(UNRELATED_TEXTS)


def episode_prompts(episode: Episode) -> list[ICLPrompt]:
    """All queries that can be asked behind a synthetic episode's demonstrations: every other noun of its categories."""
    bound = {CATEGORY_OF[noun]: label for noun, label in episode.demos}
    shown = {noun for noun, _ in episode.demos}
    return [
        ICLPrompt(episode.demos, noun, label=label, candidates=episode.candidates)
        for category, label in bound.items()
        for noun in CATEGORIES[category]
        if noun not in shown
    ]
