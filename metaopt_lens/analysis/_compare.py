"""compare(): in-context updates against finetuning updates, head by head, with nulls (docs/theory.md, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from metaopt_lens._errors import PromptError
from metaopt_lens.analysis._compare_options import Controls, Finetuning, Measures
from metaopt_lens.analysis._comparison import Comparison
from metaopt_lens.analysis._controls import finetune_arguments
from metaopt_lens.analysis._demo_sets import Updates, check_names, choose_top_k, group_sets, with_updates
from metaopt_lens.analysis._further import run_further
from metaopt_lens.analysis._further_questions import FURTHER
from metaopt_lens.analysis._joining import join_sets
from metaopt_lens.analysis._label_answers import Choices, Words, label_words
from metaopt_lens.analysis._measuring import Context, timed
from metaopt_lens.analysis._null_names import UPHILL
from metaopt_lens.analysis._output_parts import check_labels
from metaopt_lens.analysis._output_space import OutputSpace
from metaopt_lens.analysis._own_updates import OwnUpdates, finetune_sets, text_updates, uphill_updates
from metaopt_lens.analysis._set_controls import SetControls, measure_with_controls, random_twins
from metaopt_lens.finetuning import WeightUpdate, require_raw_weights
from metaopt_lens.models import wrap
from metaopt_lens.prompts import PromptLike, as_prompts
from metaopt_lens.runs import refuse_acting


def compare(
    model: Any,
    prompts: PromptLike | Sequence[PromptLike],
    update: Updates | None = None,
    *,
    controls: Controls | str = "standard",
    finetuning: Finetuning | None = None,
    measures: Measures | None = None,
    candidates: Sequence[str] | None = None,
    prepend_bos: bool | None = None,
    allow_processed: bool = False,
    allow_other_training: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Compare the in-context update of every head with the finetuning update, and with what chance would give.

    Without `update`, a learning rate is chosen on held-out demonstrations and the model is finetuned on every
    demonstration set first. `STATISTICS` is the table of what is measured, each with its nulls (docs/theory.md,
    section 4): random directions, another query's update, and, as `controls` say, the same with shuffled or flipped
    labels, other updates, finetuning on unrelated text and uphill, and permuted weights. What is answered behind
    shuffled and flipped labels is recorded too, in context and finetuned on them. Similarities of updates are also
    split by where in output space they lie (section 13). A control that cannot be made is left out, with a note.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model; never modified.
        prompts: queries with their demonstrations, in the forms `decompose` takes; prompts with the same demonstrations
            form a set.
        update: what finetuning did: one per demonstration set, in order of their first prompt (one alone for one set).
        controls: ``"quick"``, ``"standard"``, ``"sceptic"``, or `Controls`.
        finetuning: how to finetune without `update`; by default one epoch of SGD on keys and values.
        measures: how to measure: subspaces, recall, scoring of labels, the published conventions.
        candidates: label words to choose from; by default each prompt's own, else the labels of its demonstrations, and
            the query's label, which always belongs to them.
        prepend_bos: put BOS first; None for the model's default.
        allow_processed: accept a model with folded norms or biases.
        allow_other_training: accept updates that were trained on something else than their set's demonstrations.
        batch_size: queries run together; by default as many as memory allows.
        seed: of shuffles and random draws.
        progress: show a progress bar (on a terminal).

    Returns:
        A `Comparison`, its queries in the order of `prompts`.

    Raises:
        PromptError: prompts without demonstrations, labels that cannot be told apart, a gold label that is no
            candidate, too few demonstrations to hold any out for the learning rate.
        OptionError: an unknown preset; as many updates as demonstration sets are needed; `top_k` beyond the tokens
            there are; a control with the name of another null.
        ModelMismatchError: an update of another model, processed weights without `allow_processed`, or an update that
            was trained on other tokens than its set's demonstrations without `allow_other_training`.
        NonFiniteError: NaN or infinity in the activations, or a finetuning that diverges.
    """
    asked, measures, how = Controls.of(controls), measures or Measures(), finetuning or Finetuning()
    wrapped = wrap(model)
    refuse_acting(wrapped, "compare")
    prompts = as_prompts(prompts)
    require_raw_weights(wrapped, allow_processed=allow_processed)
    groups = group_sets(wrapped, prompts, prepend_bos=prepend_bos)
    check_names(asked.updates)
    check_names(asked.texts)
    words = label_words(prompts, candidates)
    choices = [
        None if words is None else Choices.of(wrapped, group, words, scoring=measures.scoring) for group in groups
    ]
    firsts = [group.prompts[0] for group in groups]
    if update is None:
        own = finetune_sets(wrapped, firsts, how, prepend_bos=prepend_bos, allow_processed=allow_processed)
    else:
        own = OwnUpdates((update,) if isinstance(update, WeightUpdate) else tuple(update), None)
    sets = with_updates(wrapped, groups, own.updates, asked.updates, allow_other_training=allow_other_training)
    top_k = choose_top_k(sets, measures.top_k)
    if asked.random_weights:
        for group in sets:
            finetune_arguments(group.update)  # an update that cannot be made again is refused before any run
    seconds: dict[str, float] = {}
    made, notes = text_updates(wrapped, firsts, own.updates, asked, seconds)
    if asked.uphill:
        with timed(seconds, UPHILL):
            uphill, more = uphill_updates(wrapped, firsts, own.updates, prepend_bos=prepend_bos)
        made, notes = {**made, **uphill}, [*notes, *more]
    without_parts = _why_not_in_parts(choices, wrapped.info.d_model)
    notes += [] if without_parts is None else [without_parts]
    context = Context(
        convention=measures.convention,
        generator=torch.Generator().manual_seed(seed),
        n_draws=asked.n_null_draws,
        top_k=top_k,
        d_model=wrapped.info.d_model,
        subspace_dim=measures.subspace_dim,
        seconds=seconds,
    )
    run = SetControls(
        controls=asked,
        space=OutputSpace(wrapped),
        twins=random_twins(wrapped, seed=seed) if asked.random_weights else {},
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        in_parts=without_parts is None,
    )
    found = []
    for number, group in enumerate(tqdm(sets, desc="comparing", unit="set", disable=None if progress else True)):
        of_set = {**group.controls, **{name: updates[number] for name, updates in made.items()}}
        seeds = [seed + number + draw * len(sets) for draw in range(max(1, asked.shuffled_labels))]
        chosen = choices[number]
        found.append(measure_with_controls(dataclasses.replace(group, controls=of_set), run, chosen, context, seeds))
    joined = join_sets(wrapped.info, prompts, sets, words, found, _settings(seed, words, measures, asked, own.updates))
    further = None
    if asked.further:
        options: dict[str, Any] = {
            "prepend_bos": prepend_bos,
            "allow_processed": allow_processed,
            "batch_size": batch_size,
        }
        with timed(seconds, FURTHER):
            further, more = run_further(wrapped, prompts, sets, own.updates, seed=seed, **options)
        notes = [*notes, *more]
    return dataclasses.replace(
        joined,
        updates=own.updates,
        learning_rate=own.choice,
        further=further,
        notes=tuple(dict.fromkeys([*notes, *joined.notes])),
        seconds=seconds,
    )


def _why_not_in_parts(choices: Sequence[Choices | None], d_model: int) -> str | None:
    """Why updates cannot be split by the label words of every query; None where they can."""
    try:
        for own in choices:
            for labels in [()] if own is None else dict.fromkeys(own.first_tokens):
                check_labels(labels, d_model)
    except PromptError as error:
        return f"the parts of output space are left out ({error})"
    return None


def _settings(
    seed: int, words: Words | None, measures: Measures, controls: Controls, updates: Sequence[WeightUpdate]
) -> dict[str, Any]:
    """What a comparison says of how it was made."""
    return {
        "seed": seed,
        "candidates": None if words is None else list(words.names),
        "scoring": measures.scoring,
        "subspace_dim": measures.subspace_dim,
        "n_null_draws": controls.n_null_draws,
        "n_label_draws": controls.shuffled_labels,
        "convention": measures.convention.name,
        "finetuning": [None if u.settings is None else dataclasses.asdict(u.settings) for u in updates],
        "prefix_shared": True,
    }
