"""compare(): in-context updates against finetuning updates, head by head, with nulls (docs/theory.md, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from metaopt_lens._storage import provenance
from metaopt_lens.analysis._answers import Choices, Words, gold_of, join_answers, label_words
from metaopt_lens.analysis._checks import check_positive
from metaopt_lens.analysis._comparison import Comparison
from metaopt_lens.analysis._context import Context
from metaopt_lens.analysis._controls import finetune_arguments, randomized_copy
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._demo_sets import DemoSet, choose_top_k, demo_sets
from metaopt_lens.analysis._label_controls import finetuned_answers, moved_labels
from metaopt_lens.analysis._measure_set import SetMeasures, Variant, measure_set
from metaopt_lens.analysis._measured import Measured
from metaopt_lens.analysis._null_names import FLIPPED_LABELS, RANDOM_WEIGHTS
from metaopt_lens.analysis._output_space import OutputSpace
from metaopt_lens.analysis._training_attention import demonstration_queries, usable_factors
from metaopt_lens.finetuning import WeightUpdate, finetune, require_raw_weights
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.prompts import ICLPrompt, PromptLike, as_prompts
from metaopt_lens.runs import Scoring, refuse_acting, tokenize_for


def compare(
    model: Any,
    prompts: PromptLike | Sequence[PromptLike],
    update: WeightUpdate | Sequence[WeightUpdate],
    *,
    controls: Mapping[str, WeightUpdate | Sequence[WeightUpdate]] | None = None,
    label_shuffled: bool = True,
    label_flipped: bool = True,
    n_label_draws: int = 4,
    random_weights: bool = False,
    candidates: Sequence[str] | None = None,
    scoring: Scoring = "mean",
    subspace_dim: int = 4,
    n_null_draws: int = 20,
    top_k: int | None = None,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    convention: Convention = Convention.DEFAULT,
    allow_processed: bool = False,
    allow_other_training: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Compare the in-context update of every head with the finetuning update, and with what chance would give.

    Statistics at head level, cosines per query unless said otherwise; FT update is ``z^FT - z^ZS``:
    ``z total`` (ICL update ``z^ICL - z^ZS``, the paper's), ``z total, after W_O``, ``z total, position-matched`` (both
    zero-shot runs keep their in-context positions), ``z direct``, ``z meta-gradient``, ``linear`` (dW_ICL q against
    dW_FT q), ``matrices`` (Frobenius cosine of dW_ICL and dW_FT), ``subspaces left`` and ``right`` (mean squared cosine
    of the principal angles of the leading singular subspaces). At layer level: ``SimAOU``, ``SimAOU unnormalised``,
    ``SimAM ICL-FT``, ``SimAM ICL-ZS``, ``SimAM difference``, and, where the update kept its factors, ``Kendall`` and
    ``top-k recall`` of the attention to training tokens (token and example level).

    Nulls (docs/theory.md, section 4): (a) ``random`` directions (of subspaces: ``rotated``, the changes that
    finetuning made to keys and values, turned at random), (b) ``other query``: another query's finetuning update, (d)
    ``shuffled labels`` in the demonstrations, (e) any weight update given in `controls` (see `unrelated_update`), (c)
    ``random weights`` with and without trained embeddings, (f) SimAOU's ``analytic`` null. ``flipped labels`` are
    another control: a consistent task, with its label words exchanged. What is answered behind shuffled and flipped
    labels is recorded too, in context and (where the update says how it was made) finetuned on them.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model; never modified.
        prompts: queries with their demonstrations, in the forms `decompose` takes; prompts with the same
            demonstrations form a set.
        update: what finetuning did: one per demonstration set, in order of their first prompt (one alone for one set).
        controls: further updates by name, shaped like `update`, whose similarity to the ICL update is a null.
        label_shuffled: also run the demonstrations with shuffled labels (see `shuffle_labels`).
        label_flipped: also run the demonstrations with flipped labels (see `flip_labels`).
        n_label_draws: shuffles of the labels per set, averaged; each costs another run of everything and a finetuning.
        random_weights: also run everything on copies of the model with permuted weights, finetuned in the same way.
        candidates: label words to choose from; by default each prompt's own, else the labels of its demonstrations,
            and the query's label, which always belongs to them.
        scoring: ``"mean"`` log-probability of the label's tokens, or that of the ``"first"`` token.
        subspace_dim: dimension of the singular subspaces.
        n_null_draws: draws of the random and other-query nulls per query.
        top_k: k of the token-level recall (default: 100, or half the tokens of the smallest set if that is less).
        convention: the choices in SimAOU, SimAM, Kendall and recall; `Convention.PUBLISHED` for the published code's.
        allow_processed: accept a model with folded norms or biases.
        allow_other_training: accept updates that were trained on something else than their set's demonstrations.
        seed: of shuffles and random draws.

    Returns:
        A `Comparison`, its queries in the order of `prompts`.

    Raises:
        PromptError: prompts without demonstrations, labels that cannot be told apart, a gold label that is no
            candidate.
        OptionError: as many updates as demonstration sets are needed; `top_k` beyond the tokens there are; a control
            with the name of another null.
        ModelMismatchError: an update of another model, processed weights without `allow_processed`, or an update that
            was trained on other tokens than its set's demonstrations without `allow_other_training`.
        NonFiniteError: NaN or infinity in the activations.
    """
    wrapped = wrap(model)
    refuse_acting(wrapped, "compare")
    prompts = as_prompts(prompts)
    require_raw_weights(wrapped, allow_processed=allow_processed)
    sets = demo_sets(
        wrapped,
        prompts,
        update,
        dict(controls or {}),
        prepend_bos=prepend_bos,
        allow_other_training=allow_other_training,
    )
    words = label_words(prompts, candidates)
    choices = [None if words is None else Choices.of(wrapped, group, words, scoring=scoring) for group in sets]
    context = Context(
        convention=convention,
        generator=torch.Generator().manual_seed(seed),
        n_draws=n_null_draws,
        top_k=choose_top_k(sets, top_k),
        d_model=wrapped.info.d_model,
        subspace_dim=subspace_dim,
    )
    check_positive(n_null_draws=n_null_draws, n_label_draws=n_label_draws, subspace_dim=subspace_dim)
    if random_weights:
        for group in sets:
            finetune_arguments(group.update)  # an update that cannot be made again is refused before any run
    space = OutputSpace(wrapped)
    twins = _twins(wrapped, seed) if random_weights else {}
    found = []
    for number, group in enumerate(tqdm(sets, desc="comparing", unit="set", disable=None if progress else True)):
        moved = moved_labels(
            group.prompts,
            shuffled=label_shuffled,
            flipped=label_flipped,
            seeds=[seed + number + draw * len(sets) for draw in range(n_label_draws)],
        )
        found.append(
            _measure(space, group, moved, twins, choices[number], context, prepend_bos=prepend_bos, size=batch_size)
        )
    settings = {
        "seed": seed,
        "candidates": None if words is None else list(words.names),
        "scoring": scoring,
        "subspace_dim": subspace_dim,
        "n_null_draws": n_null_draws,
        "n_label_draws": n_label_draws,
        "convention": convention.name,
        "finetuning": [_settings(group.update) for group in sets],
        "prefix_shared": True,
    }
    return _comparison(wrapped, prompts, sets, words, found, settings)


@dataclass(frozen=True, eq=False)
class _Found:
    """What came out for one set; with what a learner of its flipped demonstrations answers, where there are some."""

    measures: SetMeasures
    controlled: dict[str, Tensor]
    flipped: list[ICLPrompt] | None


def _twins(model: LensModel, seed: int) -> dict[str, OutputSpace]:
    """Copies of the model with permuted weights, made once for all sets."""
    kept = zip(RANDOM_WEIGHTS, (False, True), strict=True)
    return {name: OutputSpace(wrap(randomized_copy(model.host, seed=seed, keep_embeddings=k))) for name, k in kept}


def _measure(
    space: OutputSpace,
    group: DemoSet,
    moved: dict[str, list[list[ICLPrompt]]],
    twins: dict[str, OutputSpace],
    choices: Choices | None,
    context: Context,
    *,
    prepend_bos: bool | None,
    size: int | None,
) -> _Found:
    """Run one set and its variants, and finetune on what its label controls show."""
    model = space.model
    own = Variant("", space, group.tokenized, group.update)
    variants = [
        Variant(name, space, group.tokenized, update, settings=("ft", "ft_matched"))
        for name, update in group.controls.items()
    ]
    for name, twin in twins.items():
        arguments = finetune_arguments(group.update)
        options: dict[str, Any] = {"prepend_bos": prepend_bos, "progress": False, "allow_processed": True}
        update = finetune(twin.model, group.prompts[0], **options, **arguments)
        variants.append(Variant(name, twin, group.tokenized, update))
    learned: dict[str, list[Tensor]] = {}
    for name, draws in moved.items():
        for drawn in draws:
            tokenized = [tokenize_for(model, p, prepend_bos=prepend_bos) for p in drawn]
            # As many tokens leave every query where it is: nothing changes that does not see the demonstrations.
            in_place = len(tokenized[0].demonstrations) == len(group.tokenized[0].demonstrations)
            variant = Variant(name, space, tokenized, group.update, answered=True)
            variants.append(dataclasses.replace(variant, settings=("icl",)) if in_place else variant)
            if choices is not None:
                answers = finetuned_answers(
                    model,
                    drawn[0],
                    tokenized[0],
                    group.update,
                    choices,
                    prepend_bos=prepend_bos,
                    batch_size=size,
                )
                if answers is not None:
                    learned.setdefault(f"FT, {name}", []).append(answers.best)
    factors = usable_factors(group.update)
    bos = len(group.tokenized[0].bos or ())
    trained = None if factors is None else [q[bos:] for q in demonstration_queries(model, factors)]
    found = measure_set(own, variants, context, trained=trained, choices=choices, batch_size=size)
    controlled = {f"ICL, {name}": best for name, best in found.controlled.items()}
    controlled |= {name: torch.stack(rows) for name, rows in learned.items()}
    flipped = moved.get(FLIPPED_LABELS)
    return _Found(found, controlled, None if flipped is None else flipped[0])


# ---- joining ------------------------------------------------------------------------------------------------------


def _comparison(
    model: LensModel,
    prompts: Sequence[ICLPrompt],
    sets: Sequence[DemoSet],
    words: Words | None,
    found: Sequence[_Found],
    settings: dict[str, Any],
) -> Comparison:
    """All sets together, the queries in the order of the prompts."""
    order = torch.tensor([index for group in sets for index in group.indices]).argsort()
    measures = [f.measures for f in found]
    answers = {name: join_answers([m.answers[name] for m in measures])[order] for name in measures[0].answers}
    best = {name: answers[name].best if name in answers else None for name in ("ZS", "ICL", "FT")}
    return Comparison(
        model=model.info,
        statistics=_join(measures, order),
        sets=torch.cat([torch.full((len(group.prompts),), i) for i, group in enumerate(sets)])[order],
        norms={name: torch.cat([m.norms[name] for m in measures])[order] for name in measures[0].norms},
        gold=None if words is None else torch.tensor([gold_of(p, words.names) for p in prompts]),
        zs=best["ZS"],
        icl=best["ICL"],
        ft=best["FT"],
        flipped_gold=None if words is None else _flipped_gold(found, words, order),
        controlled={
            name: torch.cat([f.controlled[name] for f in found], dim=1)[:, order]
            for name in found[0].controlled
            if all(name in f.controlled for f in found)
        },
        n_demos=tuple(len(group.prompts[0].demos) for group in sets),
        answers=answers,
        settings=settings,
        provenance=provenance(),
    )


def _flipped_gold(found: Sequence[_Found], words: Words, order: Tensor) -> Tensor | None:
    """What a learner of the flipped demonstrations answers; None where a set has nothing to flip."""
    flipped = [f.flipped for f in found if f.flipped is not None]
    if len(flipped) < len(found):
        return None
    return torch.tensor([gold_of(p, words.names) for group in flipped for p in group])[order]


def _join(measures: Sequence[SetMeasures], order: Tensor) -> tuple[Measured, ...]:
    """Concatenate the sets' statistics; statistics and nulls that not every set has are dropped."""
    joined = []
    by_name = [{s.name: s for s in m.statistics} for m in measures]
    for name, first in by_name[0].items():
        if not all(name in statistics for statistics in by_name):
            continue
        parts = [statistics[name] for statistics in by_name]
        shared = [null for null in first.nulls if all(null in part.nulls for part in parts)]
        joined.append(
            dataclasses.replace(
                first,
                values=torch.cat([part.values for part in parts])[order],
                nulls={null: torch.cat([part.nulls[null] for part in parts])[order] for null in shared},
            )
        )
    return tuple(joined)


def _settings(update: WeightUpdate) -> dict[str, Any] | None:
    return None if update.settings is None else dataclasses.asdict(update.settings)
