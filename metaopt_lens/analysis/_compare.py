"""compare(): in-context updates against finetuning updates, head by head, with nulls (docs/theory.md, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from metaopt_lens._errors import ModelMismatchError, OptionError, PromptError
from metaopt_lens._storage import provenance
from metaopt_lens.analysis._checks import check_positive
from metaopt_lens.analysis._comparison import FLIPPED_LABELS, RANDOM_WEIGHTS, RESERVED, Comparison, Statistic
from metaopt_lens.analysis._controls import finetune_arguments, randomized_copy
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._label_controls import control_answers, moved_labels
from metaopt_lens.analysis._record import SetRecord, record_set
from metaopt_lens.analysis._set_statistics import (
    set_statistics,
    similarities,
    training_attention_statistics,
    usable_factors,
    with_null,
)
from metaopt_lens.finetuning import WeightUpdate, demonstration_ids, finetune, require_raw_weights
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.prompts import ICLPrompt, PromptLike, TokenizedPrompt, as_prompts, tokenize_label
from metaopt_lens.runs import (
    Scoring,
    candidate_labels,
    candidate_mass,
    check_candidates,
    prompt_groups,
    read_queries,
    refuse_acting,
    run_shared_prefix,
    scored_tokens,
    tokenize_for,
)


@dataclass(frozen=True)
class _Set:
    """One demonstration set: its prompts (and where they stood), its update and the controls for them."""

    indices: list[int]
    prompts: list[ICLPrompt]
    tokenized: list[TokenizedPrompt]
    update: WeightUpdate
    controls: dict[str, WeightUpdate]


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
        seed: of shuffles, random draws and bootstrap.

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
    sets = _sets(wrapped, prompts, update, dict(controls or {}), prepend_bos)
    sets = _check_training(sets, allow_other=allow_other_training)
    words = _candidates(wrapped, sets, prompts, candidates, scoring)
    k = _top_k(sets, top_k)
    check_positive(n_null_draws=n_null_draws, n_label_draws=n_label_draws, subspace_dim=subspace_dim)
    if random_weights:
        for group in sets:
            finetune_arguments(group.update)  # an update that cannot be made again is refused before any run
    recording: dict[str, Any] = {"subspace_dim": subspace_dim, "batch_size": batch_size}
    generator = torch.Generator().manual_seed(seed)
    norms, collected, predictions, under_control = [], [], [], []
    for number, group in enumerate(tqdm(sets, desc="comparing", unit="set", disable=None if progress else True)):
        record = record_set(wrapped, group.tokenized, group.update, **recording)
        statistics = set_statistics(
            wrapped, record, generator, n_draws=n_null_draws, subspace_dim=subspace_dim, convention=convention
        )
        for null, (host, other) in _further_records(
            wrapped,
            group,
            random_weights=seed if random_weights else None,
            prepend_bos=prepend_bos,
            **recording,
        ).items():
            statistics = with_null(statistics, null, similarities(host, other, convention=convention))
        moved = moved_labels(
            group.prompts,
            shuffled=label_shuffled,
            flipped=label_flipped,
            seeds=[seed + number + draw * len(sets) for draw in range(n_label_draws)],
        )
        answers: dict[str, list[Tensor]] = {}
        for control, draws in moved.items():
            found = []
            for drawn in draws:
                tokenized = [tokenize_for(wrapped, p, prepend_bos=prepend_bos) for p in drawn]
                other = record_set(wrapped, tokenized, group.update, **recording)
                found.append(similarities(wrapped, other, convention=convention))
                if words is not None:
                    for setting, best in control_answers(
                        wrapped,
                        drawn[0],
                        tokenized,
                        group.update,
                        _label_ids(wrapped, group, words.names),
                        _allowed(words, group),
                        scoring=scoring,
                        prepend_bos=prepend_bos,
                        batch_size=batch_size,
                    ).items():
                        answers.setdefault(f"{setting}, {control}", []).append(best)
            mean = {name: torch.stack([f[name] for f in found]).nanmean(0) for name in found[0]}
            statistics = with_null(statistics, control, mean)
        under_control.append({name: torch.stack(rows) for name, rows in answers.items()})
        statistics += training_attention_statistics(
            wrapped,
            record,
            group.tokenized[0],
            group.update,
            generator,
            n_draws=n_null_draws,
            top_k=k,
            convention=convention,
        )
        norms.append(_norms(record))
        collected.append(statistics)
        if words is not None:
            predictions.append(_predict(wrapped, group, words, scoring, batch_size))
    order = torch.tensor([index for group in sets for index in group.indices]).argsort()
    return Comparison(
        model=wrapped.info,
        statistics=_join(collected, order),
        sets=torch.cat([torch.full((len(group.prompts),), i) for i, group in enumerate(sets)])[order],
        norms={name: torch.cat([n[name] for n in norms])[order] for name in norms[0]},
        gold=None if words is None else torch.tensor([_gold(p, words.names) for p in prompts]),
        zs=_column(predictions, 0, order),
        icl=_column(predictions, 1, order),
        ft=_column(predictions, 2, order),
        flipped_gold=None if words is None or not label_flipped else _flipped_gold(prompts, words.names, sets, seed),
        controlled={
            name: torch.cat([answers[name] for answers in under_control], dim=1)[:, order]
            for name in under_control[0]
            if all(name in answers for answers in under_control)
        },
        n_demos=tuple(len(group.prompts[0].demos) for group in sets),
        settings={
            "seed": seed,
            "candidates": None if words is None else list(words.names),
            "scoring": scoring,
            "answers": _absolute(predictions, order),
            "subspace_dim": subspace_dim,
            "n_null_draws": n_null_draws,
            "n_label_draws": n_label_draws,
            "convention": convention.name,
            "finetuning": [_settings(group.update) for group in sets],
            "prefix_shared": True,
        },
        provenance=provenance(),
    )


# ---- input --------------------------------------------------------------------------------------------------------


def _sets(
    model: LensModel,
    prompts: Sequence[ICLPrompt],
    update: WeightUpdate | Sequence[WeightUpdate],
    controls: dict[str, WeightUpdate | Sequence[WeightUpdate]],
    prepend_bos: bool | None,
) -> list[_Set]:
    tokenized = [tokenize_for(model, p, prepend_bos=prepend_bos, require_demos=True) for p in prompts]
    groups = prompt_groups(tokenized)
    for index, group in enumerate(groups):
        if len(group) < 2:
            raise PromptError(
                f"demonstration set {index} has a single query; the other-query null needs at least two behind the "
                "same demonstrations."
            )
    taken = sorted(RESERVED.intersection(controls))
    if taken:
        raise OptionError(f"the control {taken[0]!r} has the name of another null: give it a name of its own.")
    updates = _per_set(update, len(groups), "update")
    control_lists = {name: _per_set(value, len(groups), f"control {name!r}") for name, value in controls.items()}
    for name, found in (("update", updates), *control_lists.items()):
        for item in found:
            model.check_same(item.model, f"the {name}")
            if item.w_k is None and item.w_v is None:
                raise ModelMismatchError(f"the {name} changes neither keys nor values, which the linear form compares.")
    return [
        _Set(
            indices=group,
            prompts=[prompts[i] for i in group],
            tokenized=[tokenized[i] for i in group],
            update=updates[number],
            controls={name: found[number] for name, found in control_lists.items()},
        )
        for number, group in enumerate(groups)
    ]


def _per_set(value: WeightUpdate | Sequence[WeightUpdate], n_sets: int, what: str) -> list[WeightUpdate]:
    found = [value] if isinstance(value, WeightUpdate) else list(value)
    if len(found) != n_sets:
        raise OptionError(
            f"there are {n_sets} demonstration sets, so {what} must be {n_sets} weight updates, in the order of the "
            f"sets' first prompts; got {len(found)}."
        )
    return found


def _check_training(sets: list[_Set], *, allow_other: bool) -> list[_Set]:
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


@dataclass(frozen=True)
class _Words:
    """The label words of all prompts, and which of them each prompt chooses among."""

    names: tuple[str, ...]
    own: tuple[tuple[str, ...], ...]


def _candidates(
    model: LensModel,
    sets: list[_Set],
    prompts: Sequence[ICLPrompt],
    given: Sequence[str] | None,
    scoring: Scoring,
) -> _Words | None:
    """None if a query has nothing to choose among: fewer than two label words."""
    own = tuple(candidate_labels(p) if given is None else tuple(given) for p in prompts)
    names = tuple(dict.fromkeys(word for words in own for word in words))
    if given is None and min(map(len, own)) < 2:
        return None
    for index, (prompt, words) in enumerate(zip(prompts, own, strict=True)):
        if prompt.label is not None and prompt.label not in words:
            raise PromptError(
                f"the gold label {prompt.label!r} of query {index} is not among its candidates {list(words)}: add it "
                "to them, or leave candidates out."
            )
    for group in sets:
        for words in dict.fromkeys(own[index] for index in group.indices):
            check_candidates(_label_ids(model, group, words), words, scoring=scoring)
    return _Words(names, own)


def _label_ids(model: LensModel, group: _Set, names: Sequence[str]) -> list[tuple[int, ...]]:
    return [tokenize_label(name, group.prompts[0].template, model.tokenizer) for name in names]


def _allowed(words: _Words, group: _Set) -> Bool[Tensor, "query candidate"]:
    return torch.tensor([[name in words.own[index] for name in words.names] for index in group.indices])


def _flipped_gold(
    prompts: Sequence[ICLPrompt], names: Sequence[str], sets: list[_Set], seed: int
) -> Int[Tensor, " query"] | None:
    """What a learner of the flipped demonstrations answers; None where a set has nothing to flip."""
    found = torch.full((len(prompts),), -1)
    for number, group in enumerate(sets):
        moved = moved_labels(group.prompts, shuffled=False, flipped=True, seeds=[seed + number])
        if not moved:
            return None
        found[group.indices] = torch.tensor([_gold(p, names) for p in moved[FLIPPED_LABELS][0]])
    return found


def _gold(prompt: ICLPrompt, names: Sequence[str]) -> int:
    return -1 if prompt.label is None else names.index(prompt.label)


def _top_k(sets: list[_Set], given: int | None) -> dict[str, int]:
    """How many entries count as top, the same for all sets; half of what the smallest set has where that is less."""
    firsts = [group.tokenized[0] for group in sets]
    spans = [zip(t.demos, t.labels, strict=True) for t in firsts]  # separators are not counted
    tokens = min(sum(label.stop - demo.start for demo, label in pairs) for pairs in spans)
    if given is not None and any(usable_factors(group.update) for group in sets) and not 1 <= given <= tokens:
        raise OptionError(f"top_k must be from 1 to the {tokens} demonstration tokens there are, got {given}.")
    demos = min(len(t.demos) for t in firsts)
    return {"token": given or min(100, max(1, tokens // 2)), "example": min(5, max(1, demos // 2))}


# ---- nulls that need further runs ---------------------------------------------------------------------------------


def _further_records(
    model: LensModel,
    group: _Set,
    *,
    random_weights: int | None,
    prepend_bos: bool | None,
    **recording: Any,
) -> dict[str, tuple[LensModel, SetRecord]]:
    """Records whose similarities are nulls: (e) other updates, (c) permuted weights."""
    records = {
        name: (model, record_set(model, group.tokenized, update, **recording))
        for name, update in group.controls.items()
    }
    if random_weights is not None:
        for name, keep in zip(RANDOM_WEIGHTS, (False, True), strict=True):
            twin = wrap(randomized_copy(model.host, seed=random_weights, keep_embeddings=keep))
            update = finetune(
                twin,
                group.prompts[0],
                prepend_bos=prepend_bos,
                progress=False,
                allow_processed=True,
                **finetune_arguments(group.update),
            )
            records[name] = twin, record_set(twin, group.tokenized, update, **recording)
    return records


# ---- predictions and joining --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Predictions:
    """Of one set, in the settings ZS, ICL and FT: the predicted candidate, and the answer in absolute numbers.

    Attributes:
        best: index of the candidate with the highest score among the query's own.
        mass: probability that the answer begins with one of the query's candidates.
        rank: rank of the right label's first token in the whole vocabulary; -1 where it is not known.
    """

    best: Int[Tensor, "setting query"]
    mass: Float[Tensor, "setting query"]
    rank: Int[Tensor, "setting query"]


def _predict(
    model: LensModel,
    group: _Set,
    words: _Words,
    scoring: Scoring,
    batch_size: int | None,
) -> _Predictions:
    """What the model answers zero-shot, in context and finetuned; demonstrations run once."""
    prompt = group.tokenized[0]
    labels = [scored_tokens(ids, scoring) for ids in _label_ids(model, group, words.names)]
    own = [[words.names.index(name) for name in words.own[index]] for index in group.indices]
    gold = [_gold(p, words.names) for p in group.prompts]
    queries = [t.ids[t.query.start :] for t in group.tokenized]
    shared = run_shared_prefix(model, prompt.ids[: prompt.query.start])
    assert shared is not None

    def answers(prefix: Any) -> list[tuple[int, float, int]]:
        readings = read_queries(model, prefix, queries, labels, n_top=1, batch_size=batch_size)
        return [
            (
                among[int(reading.scores[among].argmax())],
                candidate_mass(reading.log_probs[among], [labels[i] for i in among]),
                -1 if right < 0 else int(reading.ranks[right]),
            )
            for reading, among, right in zip(readings, own, gold, strict=True)
        ]

    before = prompt.demonstrations.start
    zs, icl = answers(shared.truncate(before)), answers(shared)
    with group.update.applied(model):
        ft = answers(run_shared_prefix(model, prompt.ids[:before]))
    best, mass, rank = zip(*(zip(*setting, strict=True) for setting in (zs, icl, ft)), strict=True)
    return _Predictions(torch.tensor(best), torch.tensor(mass, dtype=torch.float64), torch.tensor(rank))


def _absolute(predictions: list[_Predictions], order: Tensor) -> dict[str, dict[str, list[Any]]] | None:
    """Candidate mass and right label's rank (None where not known) of every query, in the order of the prompts."""
    if not predictions:
        return None
    mass = torch.cat([p.mass for p in predictions], dim=1)[:, order].tolist()
    rank = torch.cat([p.rank for p in predictions], dim=1)[:, order].tolist()
    return {
        name: {"candidate_mass": mass[i], "label_rank": [None if r < 0 else r for r in rank[i]]}
        for i, name in enumerate(("ZS", "ICL", "FT"))
    }


def _column(predictions: list[_Predictions], setting: int, order: Tensor) -> Tensor | None:
    return torch.cat([p.best[setting] for p in predictions])[order] if predictions else None


def _join(collected: list[list[Statistic]], order: Tensor) -> tuple[Statistic, ...]:
    """Concatenate the sets' statistics, in the order of the prompts; nulls that not every set has are dropped."""
    joined = []
    names = [s.name for s in collected[0] if all(any(s.name == t.name for t in other) for other in collected)]
    for name in names:
        parts = [next(s for s in statistics if s.name == name) for statistics in collected]
        shared = [null for null in parts[0].nulls if all(null in part.nulls for part in parts)]
        joined.append(
            dataclasses.replace(
                parts[0],
                values=torch.cat([part.values for part in parts])[order],
                nulls={null: torch.cat([part.nulls[null] for part in parts])[order] for null in shared},
            )
        )
    return tuple(joined)


def _norms(r: SetRecord) -> dict[str, Tensor]:
    found = {
        "icl": (r.z_icl - r.z_zs).norm(dim=-1),
        "ft": (r.z_ft - r.z_zs).norm(dim=-1),
        "direct": r.direct.norm(dim=-1),
        "meta_gradient": r.meta_gradient.norm(dim=-1),
        "mass": r.mass,
        "rank_icl": r.rank_icl,
        "rank_ft": r.rank_ft,
    }
    return {name: t.float() for name, t in found.items()}


def _settings(update: WeightUpdate) -> dict[str, Any] | None:
    return None if update.settings is None else dataclasses.asdict(update.settings)
