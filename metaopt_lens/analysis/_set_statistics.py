"""Every statistic of a comparison from the record of one set, with its nulls (docs/theory.md, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.analysis._comparison import OTHER_QUERY, RANDOM_ROTATION, Statistic
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._nulls import derangement, random_like
from metaopt_lens.analysis._rank import kendall_tau
from metaopt_lens.analysis._recall import topk_recall
from metaopt_lens.analysis._record import SetRecord
from metaopt_lens.analysis._similarity import cosine, difference, sim_am, sim_aou
from metaopt_lens.analysis._training_attention import finetuning_scores, training_attention
from metaopt_lens.finetuning import StepFactors, WeightUpdate
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs import through_w_o

Values = Float[Tensor, "query layer head"]
_Pair = Callable[[Tensor, Tensor], Tensor]
_OVERLAP = "mean squared cosine of the principal angles between the leading singular subspaces of dW_ICL and dW_FT"
_DESCRIPTIONS = {
    "z total": "z^ICL - z^ZS against z^FT - z^ZS, in d_head",
    "z total, after W_O": "the same in the residual stream",
    "z total, position-matched": (
        "z^ICL - z^ZSm against z^FTm - z^ZSm (zero-shot runs at in-context positions), in d_head"
    ),
    "z direct": "z^ICL - z_without against z^FT - z^ZS, in d_head",
    "z meta-gradient": "sum_D a v against z^FT - z^ZS, in d_head",
    "linear": "dW_ICL q against dW_FT q (first-order in depth), in d_head",
    "matrices": "Frobenius cosine of dW_ICL and dW_FT",
    "subspaces left": f"{_OVERLAP}, output side",
    "subspaces right": f"{_OVERLAP}, input side",
    "SimAOU": "attention outputs after W_O, each normalised to unit length before the differences (the published form)",
    "SimAOU unnormalised": "attention outputs after W_O",
    "SimAM ICL-FT": "scores before the softmax over the query's tokens, maps, mean over heads",
    "SimAM ICL-ZS": "scores before the softmax over the query's tokens, maps, mean over heads",
    "SimAM difference": (
        "scores before the softmax over the query's tokens, difference mode (both minus zero-shot), mean over heads"
    ),
}
_PER_SET = ("matrices", "subspaces left", "subspaces right")
# First map, second map, what is subtracted from both.
_MAPS = {
    "SimAM ICL-FT": ("icl", "ft", None),
    "SimAM ICL-ZS": ("icl", "zs", None),
    "SimAM difference": ("icl", "ft", "zs"),
}


def similarities(model: LensModel, r: SetRecord, *, convention: Convention) -> dict[str, Values]:
    """Every similarity of in-context and finetuning updates in a record, by name; layer level has one head."""
    found = {name: cosine(icl, ft) for name, (icl, ft) in _vectors(model, r).items()}
    found |= {"matrices": r.frobenius, "subspaces left": r.subspace_left, "subspaces right": r.subspace_right}
    aou = sim_aou(r.hidden_icl, r.hidden_zs, r.hidden_ft, eps=r.rounding, convention=convention)
    found |= {"SimAOU": aou.normalised.values[..., None], "SimAOU unnormalised": aou.plain.values[..., None]}
    found |= {name: _sim_am(r, name, convention)[..., None] for name in _MAPS}
    return found


def set_statistics(
    model: LensModel,
    r: SetRecord,
    generator: torch.Generator,
    *,
    n_draws: int,
    subspace_dim: int,
    convention: Convention,
) -> list[Statistic]:
    """All statistics of a set, with the nulls that need no further run."""
    nulls: dict[str, dict[str, Tensor]] = {}
    for name, (icl, ft) in _vectors(model, r).items():
        nulls[name] = {
            OTHER_QUERY: _other_query(cosine, icl, ft, generator, n_draws),
            "random": _mean_of(lambda a=icl, b=ft: cosine(a, random_like(b, seed=generator)), n_draws),  # type: ignore[misc]
        }
    nulls["matrices"] = {"random": torch.zeros_like(r.frobenius)}  # the expectation, with a random matrix
    nulls["subspaces left"] = {RANDOM_ROTATION: r.subspace_left_rotated}
    nulls["subspaces right"] = {RANDOM_ROTATION: r.subspace_right_rotated}
    nulls |= _sim_aou_nulls(r, generator, n_draws, convention)
    nulls |= {name: _sim_am_nulls(r, name, generator, n_draws, convention) for name in _MAPS}
    return [
        Statistic(
            name=name,
            description=_DESCRIPTIONS[name] + (f", k = {subspace_dim}" if name.startswith("subspaces") else ""),
            level="layer" if name.startswith("Sim") else "head",
            unit="set" if name in _PER_SET else "query",
            values=values.float(),
            nulls={null: tensor.float() for null, tensor in nulls[name].items()},
        )
        for name, values in similarities(model, r, convention=convention).items()
    ]


def with_null(statistics: Sequence[Statistic], label: str, values: dict[str, Values]) -> list[Statistic]:
    """The statistics with one more null: the same similarities from another record."""
    return [
        dataclasses.replace(s, nulls={**s.nulls, label: values[s.name].float()}) if s.name in values else s
        for s in statistics
    ]


def _vectors(model: LensModel, r: SetRecord) -> dict[str, tuple[Tensor, Tensor]]:
    minus = partial(difference, eps=r.rounding)
    total, ft = minus(r.z_icl, r.z_zs), minus(r.z_ft, r.z_zs)
    return {
        "z total": (total, ft),
        "z total, after W_O": (through_w_o(model, total), through_w_o(model, ft)),
        "z total, position-matched": (minus(r.z_icl, r.z_zsm), minus(r.z_ftm, r.z_zsm)),
        "z direct": (r.direct, ft),
        "z meta-gradient": (r.meta_gradient, ft),
        "linear": (r.linear_icl, r.linear_ft),
    }


def _mean_of(draw: Callable[[], Tensor], n_draws: int) -> Tensor:
    """Mean of draws of a null, per query."""
    return torch.stack([draw() for _ in range(n_draws)]).nanmean(0)


def _other_query(similarity: _Pair, icl: Tensor, ft: Tensor, generator: torch.Generator, n_draws: int) -> Tensor:
    """Null (b): every query's ICL update against another query's FT update."""
    return _mean_of(lambda: similarity(icl, ft[derangement(len(icl), seed=generator)]), n_draws)


def _sim_aou_nulls(
    r: SetRecord, generator: torch.Generator, n_draws: int, convention: Convention
) -> dict[str, dict[str, Tensor]]:
    update = r.hidden_ft - r.hidden_zs

    def moved(change: Tensor, *, plain: bool) -> Tensor:
        """Another update, put on the query's own baseline."""
        aou = sim_aou(r.hidden_icl, r.hidden_zs, r.hidden_zs + change, eps=r.rounding, convention=convention)
        return (aou.plain if plain else aou.normalised).values[..., None]

    def other_query(*, plain: bool) -> Tensor:
        return _mean_of(lambda: moved(update[derangement(len(update), seed=generator)], plain=plain), n_draws)

    def random() -> Tensor:
        return moved(random_like(update, seed=generator, convention=convention), plain=True)

    analytic = sim_aou(r.hidden_icl, r.hidden_zs, r.hidden_ft, convention=convention).null.values[..., None]
    return {
        "SimAOU": {"analytic": analytic, OTHER_QUERY: other_query(plain=False)},
        "SimAOU unnormalised": {OTHER_QUERY: other_query(plain=True), "random": _mean_of(random, n_draws)},
    }


def _sim_am(r: SetRecord, name: str, convention: Convention, other: Tensor | None = None) -> Tensor:
    """One form of SimAM per query and layer, `other` in place of its second map if given."""
    first, second, base = _MAPS[name]
    maps = {setting: torch.nan_to_num(getattr(r, f"scores_{setting}")) for setting in ("icl", "zs", "ft")}
    return sim_am(
        maps[first],
        maps[second] if other is None else other,
        lengths=r.lengths,
        eps=r.rounding,
        baseline=None if base is None else maps[base],
        convention=convention,
    ).per_query.values


def _sim_am_nulls(
    r: SetRecord, name: str, generator: torch.Generator, n_draws: int, convention: Convention
) -> dict[str, Tensor]:
    _, second, base = _MAPS[name]
    mask = ~torch.isnan(r.scores_icl)
    map_ = torch.nan_to_num(getattr(r, f"scores_{second}"))
    baseline = torch.zeros_like(map_) if base is None else torch.nan_to_num(getattr(r, f"scores_{base}"))

    def random() -> Tensor:
        drawn = random_like(map_ - baseline, seed=generator) * mask
        return _sim_am(r, name, convention, (baseline + drawn).to(map_.dtype))

    def other_query() -> Tensor:
        """Only a query of the same length can stand in; one that has none is left out."""
        partner = _same_length_partner(r.lengths, generator)
        values = _sim_am(r, name, convention, baseline + (map_ - baseline)[partner])
        values[partner == torch.arange(len(partner))] = torch.nan
        return values

    nulls = {"random": _mean_of(random, n_draws)[..., None]}
    moved = _mean_of(other_query, n_draws)[..., None]
    return nulls if bool(moved.isnan().all()) else {OTHER_QUERY: moved, **nulls}


def _same_length_partner(lengths: Int[Tensor, " query"], generator: torch.Generator) -> Int[Tensor, " query"]:
    partner = torch.arange(len(lengths))
    for length in sorted(set(lengths.tolist())):
        members = (lengths == length).nonzero()[:, 0]
        if len(members) > 1:
            partner[members] = members[derangement(len(members), seed=generator)]
    return partner


# ---- attention to training tokens ---------------------------------------------------------------------------------


def usable_factors(update: WeightUpdate) -> tuple[StepFactors, ...] | None:
    """Per-step factors of a finetuning whose steps are the demonstrations in the prompt's order; else None."""
    s = update.settings
    if update.factors is None or s is None or s.batch_size != 1 or s.epochs != 1 or s.order != "given":
        return None
    return update.factors


def demonstration_queries(model: LensModel, factors: Sequence[StepFactors]) -> list[Float[Tensor, "src layer d_q"]]:
    """Query vectors of every demonstration's tokens (BOS first) in its own finetuning step, with the score scale, heads
    side by side."""
    scale = torch.tensor([model.score_rule(layer).scale for layer in range(model.info.n_layers)])
    return [
        (step.q[:, 0, : step.n_tokens[0]].flatten(2).transpose(0, 1).cpu() * scale[:, None]).to(step.q.dtype)
        for step in factors
    ]


def training_attention_statistics(
    model: LensModel,
    r: SetRecord,
    prompt: TokenizedPrompt,
    update: WeightUpdate,
    generator: torch.Generator,
    *,
    n_draws: int,
    top_k: dict[str, int],
    convention: Convention,
) -> list[Statistic]:
    """Kendall's tau and top-k recall of the attention to training tokens, where finetuning kept its queries."""
    factors = usable_factors(update)
    if factors is None:
        return []
    bos = 0 if prompt.bos is None else len(prompt.bos)
    tokens = [queries[bos:] for queries in demonstration_queries(model, factors)]
    scores = r.context_scores.double(), finetuning_scores(torch.cat(tokens), r.queries_ft)
    if convention.ignores_rounding:
        scores = _merge_ties(scores[0], r.context_scores.dtype), _merge_ties(scores[1], r.queries_ft.dtype)
    lengths = torch.tensor([len(t) for t in tokens])
    maps = training_attention(*scores, lengths, convention=convention)
    found = []
    for level, icl, ft in (("token", maps.icl_token, maps.ft_token), ("example", maps.icl_example, maps.ft_example)):
        k = top_k[level]

        def tau(a: Tensor, b: Tensor) -> Tensor:
            return kendall_tau(a, b).values[..., None]

        def recall(a: Tensor, b: Tensor, k: int = k) -> Tensor:
            return topk_recall(a, b, k=k, convention=convention).per_query.values[..., None]

        for name, description, similarity, chance in (
            (
                f"Kendall, {level} level",
                "rank correlation of the attention to the demonstrations in context and in finetuning",
                tau,
                0.0,
            ),
            (
                f"top-{k} recall, {level} level",
                f"share of the {k} most attended in finetuning that are among the {k} most attended in context",
                recall,
                k / icl.shape[-1],
            ),
        ):
            values = similarity(icl, ft).float()
            moved = _other_query(similarity, icl, ft, generator, max(1, n_draws // 4)).float()
            nulls = {OTHER_QUERY: moved, "chance": torch.full_like(values, chance)}
            found.append(Statistic(name, description, "layer", "query", values, nulls))
    return found


def _merge_ties(scores: Float[Tensor, "query layer src"], dtype: torch.dtype) -> Float[Tensor, "query layer src"]:
    """Scores that differ by rounding alone made equal.

    The same word in several demonstrations has one query vector in the lowest layer: the order that rounding gives such
    ties is no ranking.
    """
    tolerance = 16 * torch.finfo(dtype).eps * scores.abs().amax(-1, keepdim=True)
    ordered, order = scores.sort(-1)
    place = torch.arange(scores.shape[-1]).expand_as(order)
    starts = torch.where(ordered.diff(dim=-1, prepend=ordered[..., :1] - 2 * tolerance - 1) > tolerance, place, 0)
    merged = ordered.gather(-1, starts.cummax(-1).values)
    return torch.empty_like(scores).scatter_(-1, order, merged)
