"""compare(): in-context updates against finetuning updates, head by head, with nulls (docs/theory.md, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from metaopt_lens._errors import ModelMismatchError, OptionError, PromptError
from metaopt_lens._storage import provenance
from metaopt_lens.analysis._comparison import Comparison, Statistic
from metaopt_lens.analysis._controls import randomized_copy, shuffle_labels
from metaopt_lens.analysis._matrices import random_subspace_angles
from metaopt_lens.analysis._nulls import derangement, random_like
from metaopt_lens.analysis._rank import kendall_tau
from metaopt_lens.analysis._recall import topk_recall
from metaopt_lens.analysis._record import SetRecord, record_set
from metaopt_lens.analysis._similarity import cosine, sim_am, sim_aou
from metaopt_lens.analysis._training_attention import finetuning_scores, training_attention
from metaopt_lens.decomposition import prompt_groups
from metaopt_lens.extraction import Scoring, check_candidates, run_shared_prefix, score_candidates
from metaopt_lens.finetuning import WeightUpdate, finetune, require_raw_weights
from metaopt_lens.models import AttentionModel, wrap
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt, tokenize_label, tokenize_prompt


@dataclass(frozen=True)
class _Set:
    """One demonstration set: its prompts, its update and the controls for them."""

    prompts: list[ICLPrompt]
    tokenized: list[TokenizedPrompt]
    update: WeightUpdate
    controls: dict[str, WeightUpdate]


def compare(
    model: Any,
    prompts: Sequence[ICLPrompt],
    update: WeightUpdate | Sequence[WeightUpdate],
    *,
    controls: Mapping[str, WeightUpdate | Sequence[WeightUpdate]] | None = None,
    label_shuffled: bool = True,
    random_weights: bool = False,
    candidates: Sequence[str] | None = None,
    scoring: Scoring = "mean",
    subspace_dim: int = 4,
    n_null_draws: int = 20,
    top_k: int | None = None,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    reference: bool = False,
    allow_processed: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Hold the in-context update of every head against the finetuning update, with what chance would give beside it.

    Statistics at head level, cosines per query unless said otherwise; FT update is ``z^FT - z^ZS``:
    ``z total`` (ICL update ``z^ICL - z^ZS``, the paper's), ``z total, after W_O``, ``z total, position-matched`` (both
    zero-shot runs keep their in-context positions), ``z direct``, ``z meta-gradient``, ``linear`` (dW_ICL q against
    dW_FT q), ``matrices`` (Frobenius cosine of dW_ICL and dW_FT), ``subspaces left`` and ``right`` (mean squared cosine
    of the principal angles of the leading singular subspaces). At layer level: ``SimAOU``, ``SimAOU unnormalised``,
    ``SimAM ICL-FT``, ``SimAM ICL-ZS``, ``SimAM difference``, and, where the update kept its factors, ``Kendall`` and
    ``top-k recall`` of the attention to training tokens (token and example level).

    Nulls (docs/theory.md, section 4): (a) ``random``, (b) ``shuffled``, (d) ``label-shuffled`` demonstrations, (e) any
    weight update given in `controls` (see `unrelated_update`), (c) ``random weights`` with and without trained
    embeddings, (f) SimAOU's ``analytic`` null.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model; never modified.
        prompts: queries with their demonstrations; prompts with the same demonstrations form a set.
        update: what finetuning did: one per demonstration set, in order of their first prompt (one alone for one set).
        controls: further updates by name, shaped like `update`, whose similarity to the ICL update is a null.
        label_shuffled: also run the demonstrations with shuffled labels.
        random_weights: also run everything on copies of the model with permuted weights (finetuned anew).
        candidates: label words to choose from; by default the prompts' own, else all labels of their demonstrations.
        scoring: ``"mean"`` log-probability of the label's tokens, or that of the ``"first"`` token.
        subspace_dim: dimension of the singular subspaces.
        n_null_draws: draws of the random and shuffled nulls per query.
        top_k: k of the token-level recall (default: 100, or half the tokens if there are fewer than 200).
        reference: the published code's choices in SimAOU, SimAM, Kendall and recall.
        allow_processed: accept a model with folded norms or biases.
        seed: of shuffles, random draws and bootstrap.

    Returns:
        A `Comparison`.

    Raises:
        PromptError: prompts without demonstrations, labels that cannot be told apart, a gold label that is no candidate.
        OptionError: as many updates as demonstration sets are needed.
        ModelMismatchError: an update of another model, or processed weights without `allow_processed`.
        NonFiniteError: NaN or infinity in the activations.
    """
    wrapped = wrap(model)
    require_raw_weights(wrapped, allow_processed=allow_processed)
    sets = _sets(wrapped, prompts, update, dict(controls or {}), prepend_bos)
    words = _candidates(sets, candidates)
    labels = None if words is None else _label_ids(wrapped, sets, words, scoring)
    if n_null_draws < 1:
        raise OptionError(f"n_null_draws must be at least 1, got {n_null_draws}.")
    generator = torch.Generator().manual_seed(seed)
    records, collected, predictions = [], [], []
    for number, group in enumerate(tqdm(sets, desc="comparing", unit="set", disable=None if progress else True)):
        record = record_set(wrapped, group.tokenized, group.update, subspace_dim=subspace_dim, batch_size=batch_size)
        statistics = _statistics(
            wrapped, record, group, generator, n_null_draws, subspace_dim=subspace_dim, top_k=top_k, reference=reference
        )
        _add_control_nulls(wrapped, statistics, record, group, batch_size, subspace_dim)
        if label_shuffled and len({demo.label for demo in group.prompts[0].demos}) > 1:
            _add_label_shuffled_null(wrapped, statistics, record, group, seed + number, prepend_bos, batch_size)
        if random_weights:
            _add_random_weight_nulls(wrapped, statistics, group, seed, subspace_dim, batch_size)
        records.append(record)
        collected.append(statistics)
        if labels is not None:
            allowed = _allowed(group, words or (), own=candidates is None)
            predictions.append(_predict(wrapped, group, labels, allowed, scoring, batch_size))
    gold = None if words is None else torch.tensor([_gold(p, words) for group in sets for p in group.prompts])
    return Comparison(
        model=wrapped.info,
        statistics=_join(collected),
        sets=torch.cat([torch.full((len(group.prompts),), i) for i, group in enumerate(sets)]),
        norms=_norms(records),
        gold=gold,
        zs=_column(predictions, 0),
        icl=_column(predictions, 1),
        ft=_column(predictions, 2),
        n_demos=tuple(len(group.prompts[0].demos) for group in sets),
        settings={
            "seed": seed,
            "candidates": None if words is None else list(words),
            "scoring": scoring,
            "subspace_dim": subspace_dim,
            "n_null_draws": n_null_draws,
            "reference": reference,
            "finetuning": [_settings(group.update) for group in sets],
            "prefix_shared": True,
        },
        provenance=provenance(),
    )


# ---- input --------------------------------------------------------------------------------------------------------


def _sets(
    model: AttentionModel,
    prompts: Sequence[ICLPrompt],
    update: WeightUpdate | Sequence[WeightUpdate],
    controls: dict[str, WeightUpdate | Sequence[WeightUpdate]],
    prepend_bos: bool | None,
) -> list[_Set]:
    if not prompts:
        raise PromptError("compare needs at least one prompt.")
    tokenized = [
        tokenize_prompt(p, model.tokenizer, prepend_bos=prepend_bos, max_tokens=model.info.n_ctx, require_demos=True)
        for p in prompts
    ]
    groups = prompt_groups(tokenized)
    for index, group in enumerate(groups):
        if len(group) < 2:
            raise PromptError(
                f"demonstration set {index} has a single query; the shuffled null needs at least two behind the same "
                "demonstrations."
            )
    updates = _per_set(update, len(groups), "update")
    control_lists = {name: _per_set(value, len(groups), f"control {name!r}") for name, value in controls.items()}
    for name, found in (("update", updates), *control_lists.items()):
        for item in found:
            model.check_same(item.model, f"the {name}")
            if item.w_k is None and item.w_v is None:
                raise ModelMismatchError(f"the {name} changes neither keys nor values, which the linear form compares.")
    return [
        _Set(
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


def _candidates(sets: list[_Set], given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The label words, the same for all queries of a set; None if there is only one."""
    prompts = [p for group in sets for p in group.prompts]
    own = {p.candidates for p in prompts}
    if given is not None:
        words = tuple(given)
    elif None not in own:
        words = tuple(dict.fromkeys(word for p in prompts for word in (p.candidates or ())))
    else:
        words = tuple(dict.fromkeys(demo.label for p in prompts for demo in p.demos))
    if len(words) < 2:
        return None
    for index, prompt in enumerate(prompts):
        allowed = words if given is not None or prompt.candidates is None else prompt.candidates
        if prompt.label is not None and prompt.label not in allowed:
            raise PromptError(
                f"the gold label {prompt.label!r} of query {index} is not among its candidates {list(allowed)}."
            )
    return words


def _label_ids(
    model: AttentionModel, sets: list[_Set], words: Sequence[str], scoring: Scoring
) -> list[tuple[int, ...]]:
    template = sets[0].prompts[0].template
    ids = [tokenize_label(word, template, model.tokenizer) for word in words]
    check_candidates(ids, words, scoring=scoring)
    return ids


def _gold(prompt: ICLPrompt, words: Sequence[str]) -> int:
    return -1 if prompt.label is None else words.index(prompt.label)


# ---- statistics ---------------------------------------------------------------------------------------------------


def _statistics(
    model: AttentionModel,
    r: SetRecord,
    group: _Set,
    generator: torch.Generator,
    n_draws: int,
    *,
    subspace_dim: int,
    top_k: int | None,
    reference: bool,
) -> list[Statistic]:
    total, ft = r.z_icl - r.z_zs, r.z_ft - r.z_zs
    w_o = torch.stack([model.w_o(layer).detach().to("cpu", r.z_icl.dtype) for layer in range(model.info.n_layers)])

    def through(z: Tensor) -> Tensor:
        return torch.einsum("qlhd,lhdm->qlhm", z, w_o)

    pairs = [
        ("z total", "z^ICL - z^ZS against z^FT - z^ZS, in d_head", total, ft),
        ("z total, after W_O", "the same in the residual stream", through(total), through(ft)),
        (
            "z total, position-matched",
            "z^ICL - z^ZSm against z^FTm - z^ZSm (zero-shot runs at in-context positions), in d_head",
            r.z_icl - r.z_zsm,
            r.z_ftm - r.z_zsm,
        ),
        ("z direct", "z^ICL - z_without against z^FT - z^ZS, in d_head", r.direct, ft),
        ("z meta-gradient", "sum_D a v against z^FT - z^ZS, in d_head", r.meta_gradient, ft),
        ("linear", "dW_ICL q against dW_FT q (first-order in depth), in d_head", r.linear_icl, r.linear_ft),
    ]
    found = [_cosine_statistic(*pair, generator, n_draws) for pair in pairs]
    found += _matrix_statistics(model, r, generator, n_draws, subspace_dim)
    found += _layer_statistics(r, generator, n_draws, reference)
    found += _training_attention_statistics(r, group, generator, n_draws, top_k, reference)
    return found


def _cosine_statistic(
    name: str, description: str, icl: Tensor, ft: Tensor, generator: torch.Generator, n_draws: int
) -> Statistic:
    return Statistic(
        name=name,
        description=description,
        level="head",
        values=cosine(icl, ft).float(),
        nulls={
            "shuffled": _shuffled(lambda a, b: cosine(a, b), icl, ft, generator, n_draws),
            "random": _mean_of(lambda: cosine(icl, random_like(ft, seed=generator)), n_draws),
        },
    )


def _mean_of(draw: Any, n_draws: int) -> Tensor:
    """Mean of draws of a null, per query."""
    return torch.stack([draw() for _ in range(n_draws)]).nanmean(0).float()


def _shuffled(similarity: Any, icl: Tensor, ft: Tensor, generator: torch.Generator, n_draws: int) -> Tensor:
    """Null (b): every query's ICL update against another query's FT update."""

    def draw() -> Tensor:
        order = derangement(len(icl), seed=generator)
        return similarity(icl, ft[order])  # type: ignore[no-any-return]

    return _mean_of(draw, n_draws)


def _matrix_statistics(
    model: AttentionModel, r: SetRecord, generator: torch.Generator, n_draws: int, k: int
) -> list[Statistic]:
    # A random matrix of equal norm has an expected Frobenius cosine of exactly 0 with anything.
    zero = torch.zeros_like(r.frobenius)
    d_head = model.info.d_head
    chance = torch.tensor(float("nan"))
    if k <= d_head:
        angles = random_subspace_angles(d_head, k, n_draws=max(200, n_draws), seed=generator)
        chance = angles.cos().square().mean()
    overlap = torch.full_like(r.subspace_left, float(chance))
    described = "mean squared cosine of the principal angles between the leading singular subspaces of dW_ICL and dW_FT"
    return [
        Statistic("matrices", "Frobenius cosine of dW_ICL and dW_FT", "head", r.frobenius, {"random": zero}),
        Statistic("subspaces left", f"{described}, output side, k = {k}", "head", r.subspace_left, {"random": overlap}),
        Statistic(
            "subspaces right", f"{described}, input side, k = {k}", "head", r.subspace_right, {"random": overlap}
        ),
    ]


def _layer_statistics(r: SetRecord, generator: torch.Generator, n_draws: int, reference: bool) -> list[Statistic]:
    aou = sim_aou(r.hidden_icl, r.hidden_zs, r.hidden_ft, reference=reference)

    def shuffled_aou(kind: str) -> Tensor:
        def draw() -> Tensor:
            order = derangement(len(r.hidden_icl), seed=generator)
            # Another query's update, put on this query's baseline.
            moved = r.hidden_zs + (r.hidden_ft - r.hidden_zs)[order]
            return getattr(sim_aou(r.hidden_icl, r.hidden_zs, moved, reference=reference), kind).values  # type: ignore[no-any-return]

        return _mean_of(draw, n_draws)

    def random_aou() -> Tensor:
        moved = r.hidden_zs + random_like(r.hidden_ft - r.hidden_zs, seed=generator, reference=reference)
        return sim_aou(r.hidden_icl, r.hidden_zs, moved, reference=reference).plain.values

    found = [
        _layer_statistic(
            "SimAOU",
            "attention outputs after W_O, each normalised to unit length before the differences (the published form)",
            aou.normalised.values,
            {"analytic": aou.null.values, "shuffled": shuffled_aou("normalised")},
        ),
        _layer_statistic(
            "SimAOU unnormalised",
            "attention outputs after W_O",
            aou.plain.values,
            {"shuffled": shuffled_aou("plain"), "random": _mean_of(random_aou, n_draws)},
        ),
    ]
    maps = {name: torch.nan_to_num(s) for name, s in (("icl", r.scores_icl), ("zs", r.scores_zs), ("ft", r.scores_ft))}
    mask = ~torch.isnan(r.scores_icl)
    for name, first, second, baseline in (
        ("SimAM ICL-FT", "icl", "ft", None),
        ("SimAM ICL-ZS", "icl", "zs", None),
        ("SimAM difference", "icl", "ft", "zs"),
    ):
        found.append(_sim_am_statistic(name, maps, first, second, baseline, r, mask, generator, n_draws, reference))
    return found


def _sim_am_statistic(
    name: str,
    maps: dict[str, Tensor],
    first: str,
    second: str,
    baseline: str | None,
    r: SetRecord,
    mask: Tensor,
    generator: torch.Generator,
    n_draws: int,
    reference: bool,
) -> Statistic:
    base = None if baseline is None else maps[baseline]

    def similarity(other: Tensor) -> Tensor:
        return sim_am(maps[first], other, lengths=r.lengths, baseline=base, reference=reference).per_query.values

    def random_map() -> Tensor:
        reached = maps[second] if base is None else maps[second] - base
        drawn = random_like(reached, seed=generator) * mask
        return similarity(drawn if base is None else base + drawn)

    def shuffled_map() -> Tensor:
        partner = _same_length_partner(r.lengths, generator)
        value = similarity(maps[second][partner])
        # Only a query of the same length can stand in; one that has none is left out.
        alone = partner == torch.arange(len(partner))
        value[alone] = torch.nan
        return value

    nulls = {"random": _mean_of(random_map, n_draws)}
    shuffled = _mean_of(shuffled_map, n_draws)
    if not bool(shuffled.isnan().all()) and baseline is None:
        nulls = {"shuffled": shuffled, **nulls}
    what = "difference mode (both minus zero-shot)" if baseline else "maps"
    return _layer_statistic(
        name,
        f"scores before the softmax over the query's tokens, {what}, mean over heads",
        similarity(maps[second]),
        nulls,
    )


def _same_length_partner(lengths: Int[Tensor, " query"], generator: torch.Generator) -> Int[Tensor, " query"]:
    partner = torch.arange(len(lengths))
    for length in lengths.unique().tolist():
        members = (lengths == length).nonzero()[:, 0]
        if len(members) > 1:
            partner[members] = members[derangement(len(members), seed=generator)]
    return partner


def _layer_statistic(name: str, description: str, values: Tensor, nulls: dict[str, Tensor]) -> Statistic:
    return Statistic(
        name, description, "layer", values[..., None].float(), {n: t[..., None].float() for n, t in nulls.items()}
    )


def _training_attention_statistics(
    r: SetRecord, group: _Set, generator: torch.Generator, n_draws: int, top_k: int | None, reference: bool
) -> list[Statistic]:
    """Kendall's tau and top-k recall of the attention to training tokens, where finetuning kept its queries."""
    factors = group.update.factors
    settings = group.update.settings
    if (
        factors is None
        or settings is None
        or settings.batch_size != 1
        or settings.epochs != 1
        or settings.order != "given"
    ):
        return []
    prompt = group.tokenized[0]
    bos = 0 if prompt.bos is None else len(prompt.bos)
    scale = r.queries_ft.new_ones(())  # queries_ft carries the score scale already, as the published records do
    tokens = [step.q[:, 0, bos:n].flatten(2).transpose(0, 1) for step in factors for n in step.n_tokens]
    ft_scores = finetuning_scores(torch.cat(tokens).cpu() * scale, r.queries_ft)
    lengths = torch.tensor([len(t) for t in tokens])
    maps = training_attention(r.context_scores.double(), ft_scores, lengths, reference=reference)
    found = []
    for level, icl, ft in (("token", maps.icl_token, maps.ft_token), ("example", maps.icl_example, maps.ft_example)):
        n = icl.shape[-1]
        k = min(top_k or 100, max(1, n // 2)) if level == "token" else min(5, max(1, n // 2))

        def tau(a: Tensor, b: Tensor) -> Tensor:
            return kendall_tau(a, b, reference=reference).values

        def recall(a: Tensor, b: Tensor, k: int = k) -> Tensor:
            return topk_recall(a, b, k=k, reference=reference).per_query.values

        found.append(
            _layer_statistic(
                f"Kendall, {level} level",
                "rank correlation of the attention to the demonstrations in context and in finetuning",
                tau(icl, ft),
                {
                    "shuffled": _shuffled(tau, icl, ft, generator, max(1, n_draws // 4)),
                    "chance": torch.zeros(icl.shape[:2]),
                },
            )
        )
        found.append(
            _layer_statistic(
                f"top-{k} recall, {level} level",
                f"share of the {k} most attended in finetuning that are among the {k} most attended in context",
                recall(icl, ft),
                {
                    "shuffled": _shuffled(recall, icl, ft, generator, max(1, n_draws // 4)),
                    "chance": torch.full(icl.shape[:2], k / n),
                },
            )
        )
    return found


# ---- nulls that need further runs ---------------------------------------------------------------------------------


def _with_null(statistics: list[Statistic], name: str, label: str, values: Tensor) -> None:
    for index, statistic in enumerate(statistics):
        if statistic.name == name:
            statistics[index] = dataclasses.replace(statistic, nulls={**statistic.nulls, label: values.float()})


def _add_control_nulls(
    model: AttentionModel,
    statistics: list[Statistic],
    record: SetRecord,
    group: _Set,
    batch_size: int | None,
    subspace_dim: int,
) -> None:
    """Null (e): the same ICL update against what another finetuning of equal norm does."""
    for label, update in group.controls.items():
        other = record_set(model, group.tokenized, update, subspace_dim=subspace_dim, batch_size=batch_size)
        ft = other.z_ft - other.z_zs
        _with_null(statistics, "z total", label, cosine(record.z_icl - record.z_zs, ft))
        _with_null(statistics, "z direct", label, cosine(record.direct, ft))
        _with_null(statistics, "z meta-gradient", label, cosine(record.meta_gradient, ft))
        _with_null(statistics, "linear", label, cosine(record.linear_icl, other.linear_ft))
        _with_null(statistics, "matrices", label, other.frobenius)
        aou = sim_aou(record.hidden_icl, record.hidden_zs, other.hidden_ft)
        _with_null(statistics, "SimAOU", label, aou.normalised.values[..., None])
        _with_null(statistics, "SimAOU unnormalised", label, aou.plain.values[..., None])


def _add_label_shuffled_null(
    model: AttentionModel,
    statistics: list[Statistic],
    record: SetRecord,
    group: _Set,
    seed: int,
    prepend_bos: bool | None,
    batch_size: int | None,
) -> None:
    """Null (d): the ICL update of demonstrations with shuffled labels against the same FT update."""
    shuffled = shuffle_labels(group.prompts[0], seed=seed)
    tokenized = [
        tokenize_prompt(p.with_demos(shuffled.demos), model.tokenizer, prepend_bos=prepend_bos) for p in group.prompts
    ]
    other = record_set(model, tokenized, group.update, subspace_dim=1, batch_size=batch_size)
    ft = record.z_ft - record.z_zs
    label = "label-shuffled"
    _with_null(statistics, "z total", label, cosine(other.z_icl - record.z_zs, ft))
    _with_null(statistics, "z direct", label, cosine(other.direct, ft))
    _with_null(statistics, "z meta-gradient", label, cosine(other.meta_gradient, ft))
    _with_null(statistics, "linear", label, cosine(other.linear_icl, record.linear_ft))
    aou = sim_aou(other.hidden_icl, record.hidden_zs, record.hidden_ft)
    _with_null(statistics, "SimAOU", label, aou.normalised.values[..., None])
    _with_null(statistics, "SimAOU unnormalised", label, aou.plain.values[..., None])


def _add_random_weight_nulls(
    model: AttentionModel,
    statistics: list[Statistic],
    group: _Set,
    seed: int,
    subspace_dim: int,
    batch_size: int | None,
) -> None:
    """Null (c): the same pipeline on permuted weights, finetuned with the same settings."""
    settings = group.update.settings
    if settings is None:
        raise OptionError("random_weights finetunes anew and needs an update made by finetune, not a sum.")
    for label, keep in (("random weights", False), ("random weights, trained embeddings", True)):
        twin = wrap(randomized_copy(model.host, seed=seed, keep_embeddings=keep))
        update = finetune(
            twin,
            group.prompts[0],
            progress=False,
            allow_processed=True,
            **{
                **{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)},
                "optimizer": getattr(torch.optim, settings.optimizer),
            },
        )
        other = record_set(twin, group.tokenized, update, subspace_dim=subspace_dim, batch_size=batch_size)
        ft = other.z_ft - other.z_zs
        _with_null(statistics, "z total", label, cosine(other.z_icl - other.z_zs, ft))
        _with_null(statistics, "z direct", label, cosine(other.direct, ft))
        _with_null(statistics, "z meta-gradient", label, cosine(other.meta_gradient, ft))
        _with_null(statistics, "linear", label, cosine(other.linear_icl, other.linear_ft))
        _with_null(statistics, "matrices", label, other.frobenius)
        aou = sim_aou(other.hidden_icl, other.hidden_zs, other.hidden_ft)
        _with_null(statistics, "SimAOU", label, aou.normalised.values[..., None])
        _with_null(statistics, "SimAOU unnormalised", label, aou.plain.values[..., None])


# ---- predictions and joining --------------------------------------------------------------------------------------


def _predict(
    model: AttentionModel,
    group: _Set,
    labels: list[tuple[int, ...]],
    allowed: Bool[Tensor, "query candidate"],
    scoring: Scoring,
    batch_size: int | None,
) -> Int[Tensor, "setting query"]:
    """Predicted candidate zero-shot, in context and finetuned; demonstrations run once."""
    prompt = group.tokenized[0]
    queries = [t.ids[t.query.start :] for t in group.tokenized]
    shared = run_shared_prefix(model, prompt.ids[: prompt.query.start])
    assert shared is not None

    def best(prefix: Any) -> Tensor:
        scores = score_candidates(model, prefix, queries, labels, scoring=scoring, batch_size=batch_size)
        return scores.masked_fill(~allowed, -torch.inf).argmax(-1)

    before = prompt.demonstrations.start
    zs, icl = best(shared.truncate(before)), best(shared)
    with group.update.applied(model):
        ft = best(run_shared_prefix(model, prompt.ids[:before]))
    return torch.stack([zs, icl, ft])


def _allowed(group: _Set, words: Sequence[str], *, own: bool) -> Bool[Tensor, "query candidate"]:
    """Which label words each query chooses among: its own candidates, where it names them."""
    return torch.tensor(
        [[not own or p.candidates is None or word in p.candidates for word in words] for p in group.prompts]
    )


def _column(predictions: list[Tensor], setting: int) -> Tensor | None:
    return torch.cat([p[setting] for p in predictions]) if predictions else None


def _join(collected: list[list[Statistic]]) -> tuple[Statistic, ...]:
    """Concatenate the sets' statistics; nulls that not every set has are dropped."""
    joined = []
    names = [s.name for s in collected[0] if all(any(s.name == t.name for t in other) for other in collected)]
    for name in names:
        parts = [next(s for s in statistics if s.name == name) for statistics in collected]
        shared = [null for null in parts[0].nulls if all(null in part.nulls for part in parts)]
        joined.append(
            dataclasses.replace(
                parts[0],
                values=torch.cat([part.values.float() for part in parts]),
                nulls={null: torch.cat([part.nulls[null].float() for part in parts]) for null in shared},
            )
        )
    return tuple(joined)


def _norms(records: list[SetRecord]) -> dict[str, Tensor]:
    def joined(read: Any) -> Tensor:
        return torch.cat([read(r).float() for r in records])

    return {
        "icl": joined(lambda r: (r.z_icl - r.z_zs).norm(dim=-1)),
        "ft": joined(lambda r: (r.z_ft - r.z_zs).norm(dim=-1)),
        "direct": joined(lambda r: r.direct.norm(dim=-1)),
        "meta_gradient": joined(lambda r: r.meta_gradient.norm(dim=-1)),
        "mass": joined(lambda r: r.mass),
        "rank_icl": joined(lambda r: r.rank_icl),
        "rank_ft": joined(lambda r: r.rank_ft),
    }


def _settings(update: WeightUpdate) -> dict[str, Any] | None:
    return None if update.settings is None else dataclasses.asdict(update.settings)
