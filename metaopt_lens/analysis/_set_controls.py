"""One demonstration set with its controls: further runs of its queries, and finetuning on its moved labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from metaopt_lens._errors import NonFiniteError
from metaopt_lens.analysis._compare_options import Controls
from metaopt_lens.analysis._controls import finetune_arguments, randomized_copy
from metaopt_lens.analysis._demo_sets import TrainedSet
from metaopt_lens.analysis._label_answers import Choices
from metaopt_lens.analysis._label_controls import finetuned_answers, moved_labels
from metaopt_lens.analysis._measure_set import SetMeasures, Variant, measure_set
from metaopt_lens.analysis._measuring import Context, timed
from metaopt_lens.analysis._null_names import FLIPPED_LABELS, RANDOM_WEIGHTS, UPHILL
from metaopt_lens.analysis._output_space import OutputSpace
from metaopt_lens.analysis._training_attention import demonstration_queries, usable_factors
from metaopt_lens.finetuning import finetune
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.prompts import ICLPrompt
from metaopt_lens.runs import tokenize_all


@dataclass(frozen=True, eq=False)
class SetControls:
    """What is run for every set.

    Attributes:
        controls: as asked for.
        space: of the model.
        twins: copies of the model with permuted weights, by null.
        prepend_bos: put BOS first; None for the model's default.
        batch_size: queries run together; None for as many as memory allows.
        in_parts: also split updates by the label words.
    """

    controls: Controls
    space: OutputSpace
    twins: Mapping[str, OutputSpace]
    prepend_bos: bool | None
    batch_size: int | None
    in_parts: bool


@dataclass(frozen=True, eq=False)
class SetFound:
    """What came out for one set.

    Attributes:
        measures: statistics, norms and answers.
        controlled: predicted candidates under the controls on labels, one row a draw, by setting and control.
        flipped: the prompts with flipped labels; None where there is nothing to flip, or it was not asked for.
        notes: what was left out, and why.
    """

    measures: SetMeasures
    controlled: dict[str, Int[Tensor, "draw query"]]
    flipped: list[ICLPrompt] | None
    notes: tuple[str, ...]


def random_twins(model: LensModel, *, seed: int) -> dict[str, OutputSpace]:
    """Copies of the model with permuted weights, made once for all sets.

    Args:
        model: never modified.
        seed: of the permutations.
    """
    kept = zip(RANDOM_WEIGHTS, (False, True), strict=True)
    return {name: OutputSpace(wrap(randomized_copy(model.host, seed=seed, keep_embeddings=k))) for name, k in kept}


def measure_with_controls(
    group: TrainedSet, run: SetControls, choices: Choices | None, context: Context, seeds: Sequence[int]
) -> SetFound:
    """Measure one set and everything it is compared with.

    Args:
        group: the set.
        run: what is run for every set.
        choices: what its queries choose among; None for no answers.
        context: of the comparison.
        seeds: of the draws of shuffled labels; the first one also of the flip.

    Raises:
        NonFiniteError: NaN or infinity in the activations.
    """
    model = run.space.model
    moved = moved_labels(
        group.prompts, shuffled=run.controls.shuffled_labels > 0, flipped=run.controls.flipped_labels, seeds=seeds
    )
    controls = [
        Variant(name, run.space, group.tokenized, update, settings=("ft", "ft_matched"))
        for name, update in group.controls.items()
    ]
    controls += [_moved(name, group, run, drawn) for name, draws in moved.items() for drawn in draws]
    own = Variant("", run.space, group.tokenized, group.update, answered=True)
    factors = usable_factors(group.update)
    bos = len(group.tokenized[0].bos or ())
    trained = None if factors is None else [q[bos:] for q in demonstration_queries(model, factors)]
    options: dict[str, Any] = {"trained": trained, "choices": choices, "batch_size": run.batch_size}
    options["labels"] = choices.first_tokens if choices is not None and run.in_parts else None
    notes: tuple[str, ...] = ()
    sturdy = [variant for variant in controls if variant.null != UPHILL]
    try:
        found = measure_set(own, [*controls, *_on_twins(group, run, context.seconds)], context, **options)
    except NonFiniteError as error:
        if not run.twins and len(sturdy) == len(controls):
            raise
        notes = (f"the runs on permuted weights, and those finetuned uphill, are left out ({error})",)
        found = measure_set(own, sturdy, context, **options)
    controlled = {f"ICL, {name}": best for name, best in found.controlled.items()}
    controlled |= {f"FT, {name}": best for name, best in _learned(group, run, moved, choices, context.seconds).items()}
    flipped = moved.get(FLIPPED_LABELS)
    return SetFound(found, controlled, None if flipped is None else flipped[0], notes)


def _moved(name: str, group: TrainedSet, run: SetControls, drawn: Sequence[ICLPrompt]) -> Variant:
    """The queries behind moved labels."""
    tokenized = tokenize_all(run.space.model, drawn, prepend_bos=run.prepend_bos)
    variant = Variant(name, run.space, tokenized, group.update, answered=True)
    # As many tokens leave every query where it is: nothing changes that does not see the demonstrations.
    in_place = len(tokenized[0].demonstrations) == len(group.tokenized[0].demonstrations)
    return dataclasses.replace(variant, settings=("icl",)) if in_place else variant


def _on_twins(group: TrainedSet, run: SetControls, seconds: MutableMapping[str, float]) -> list[Variant]:
    """The whole pipeline on models with permuted weights."""
    variants = []
    for name, twin in run.twins.items():
        with timed(seconds, name):
            update = finetune(
                twin.model,
                group.prompts[0],
                prepend_bos=run.prepend_bos,
                progress=False,
                allow_processed=True,
                **finetune_arguments(group.update),
            )
        variants.append(Variant(name, twin, group.tokenized, update))
    return variants


def _learned(
    group: TrainedSet,
    run: SetControls,
    moved: Mapping[str, list[list[ICLPrompt]]],
    choices: Choices | None,
    seconds: MutableMapping[str, float],
) -> dict[str, Tensor]:
    """What is answered zero-shot after finetuning on moved labels, one row a draw."""
    if choices is None:
        return {}
    learned: dict[str, list[Tensor]] = {}
    for name, draws in moved.items():
        for drawn in draws:
            options: dict[str, Any] = {"prepend_bos": run.prepend_bos, "batch_size": run.batch_size}
            first = group.tokenized[0]
            with timed(seconds, name):
                answers = finetuned_answers(run.space.model, drawn[0], first, group.update, choices, **options)
            if answers is not None:
                learned.setdefault(name, []).append(answers.best)
    return {name: torch.stack(rows) for name, rows in learned.items()}
