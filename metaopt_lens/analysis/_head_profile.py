"""head_profile(): one table of what different theories of in-context learning say about every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError
from metaopt_lens._plots import draw
from metaopt_lens._storage import provenance
from metaopt_lens._types import HeadRef
from metaopt_lens.analysis._compare import compare
from metaopt_lens.analysis._comparison import Comparison
from metaopt_lens.analysis._demo_sets import Updates
from metaopt_lens.analysis._head_scores import attention_scores_of_heads, function_vector_scores, task_scores
from metaopt_lens.analysis._interval import Interval, mean_interval, set_means
from metaopt_lens.decomposition import Decomposition, DecompositionSet, decompose
from metaopt_lens.interventions import head_effects, split_queries
from metaopt_lens.models import LensModel, ModelInfo, wrap
from metaopt_lens.prompts import ICLPrompt, PromptLike, as_prompts
from metaopt_lens.runs import prompt_groups, tokenize_all

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class HeadProfile(Stored):
    """Scores of every head, per query: which theories of in-context learning name the same heads?

    Attributes:
        model: names and sizes.
        scores: by name, one value per query and head; those of the model alone are the same for all queries.
        sets: the demonstration set of each query.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "head profile"

    model: ModelInfo
    scores: dict[str, Float[Tensor, "query layer head"]]
    sets: Int[Tensor, " query"]
    provenance: dict[str, Any] = field(default_factory=provenance)

    def mean(self, score: str) -> Float[Tensor, "layer head"]:
        """Mean of a score over the demonstration sets.

        Args:
            score: its name.

        Raises:
            OptionError: no such score.
        """
        if score not in self.scores:
            raise OptionError(f"there is no score {score!r}: choose one of {', '.join(self.scores)}.")
        return set_means(self.scores[score], self.sets).nanmean(0)

    def rank_correlation(self, first: str, second: str, *, level: float = 0.95) -> Interval:
        """Spearman's rho of two scores over the heads: mean over demonstration sets of each set's rho.

        The interval is Student's t over sets; with a single set there is none.

        Args:
            first: name of a score.
            second: name of another.
            level: nominal coverage.
        """
        self.mean(first), self.mean(second)  # known names
        one, other = (set_means(self.scores[name], self.sets).flatten(1) for name in (first, second))
        rho = torch.stack([spearman_rho(a, b) for a, b in zip(one, other, strict=True)])
        return mean_interval(rho, sets=torch.arange(len(rho)), level=level)

    def rank_correlations(self) -> pd.DataFrame:
        """Spearman's rho of all pairs of scores, as a matrix."""
        import pandas as pd

        names = list(self.scores)
        values = [[float(self.rank_correlation(a, b).estimate) for b in names] for a in names]
        return pd.DataFrame(values, index=names, columns=names)

    def to_frame(self) -> pd.DataFrame:
        """One row per head, one column per score: means over demonstration sets."""
        import pandas as pd

        n_layers, n_heads = self.model.n_layers, self.model.n_heads
        refs = [HeadRef(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        columns: dict[str, Any] = {
            "name": [str(ref) for ref in refs],
            "layer": [ref.layer for ref in refs],
            "head": [ref.head for ref in refs],
        }
        return pd.DataFrame(columns | {name: self.mean(name).flatten().numpy() for name in self.scores})

    def plot(self, first: str | None = None, second: str | None = None) -> Any:
        """A plotly matrix of all rank correlations, or a scatter plot of two scores, a point per head.

        Args:
            first: score along x; None for the matrix.
            second: score along y.
        """
        return draw(self, "plot", first, second)

    def _repr_html_(self) -> str:
        """The table."""
        table: str = self.to_frame().to_html(index=False, float_format="{:.3f}".format, max_rows=40)
        return table

    def __repr__(self) -> str:
        n_sets = len(set(self.sets.tolist()))
        lines = [
            f"HeadProfile of {self.model.name}: {len(self.sets)} queries behind {n_sets} "
            f"demonstration set{'s' if n_sets > 1 else ''}"
        ]
        for name in self.scores:
            values = self.mean(name)
            best = values.abs().nan_to_num(-1.0).flatten().argsort(descending=True)[:5].tolist()
            refs = [HeadRef(index // self.model.n_heads, index % self.model.n_heads) for index in best]
            shown = ", ".join(f"{ref} {float(values[ref.layer, ref.head]):+.3g}" for ref in refs)
            lines.append(f"  {name}: {shown}")
        return "\n".join(lines)


def join_profiles(parts: Sequence[HeadProfile]) -> HeadProfile:
    """All demonstration sets of several profiles of one model, in order; scores that not every one has are left out.

    Args:
        parts: one or more.
    """
    shared = [name for name in parts[0].scores if all(name in part.scores for part in parts)]
    counts = [0, *(int(part.sets.max()) + 1 for part in parts)]
    sets = torch.cat([part.sets + sum(counts[: i + 1]) for i, part in enumerate(parts)])
    scores = {name: torch.cat([part.scores[name] for part in parts]) for name in shared}
    return HeadProfile(parts[0].model, scores, sets, parts[0].provenance)


def head_profile(
    model: Any,
    prompts: Sequence[PromptLike],
    *,
    comparison: Comparison | None = None,
    update: Updates | None = None,
    exact: bool = True,
    function_vectors: bool = True,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> HeadProfile:
    """Scores of every head from several theories of in-context learning (docs/theory.md, section 11).

    Columns: ``mass`` and ``meta_gradient_share`` of the split; ``zero_shot_logit`` and ``meta_gradient_logit``, direct
    contributions to the label's logit against the other candidates'; ``knock_out`` (or ``first_order``), the effect of
    the head's meta-gradient on that difference; ``function_vector``, ``induction``, ``previous_token``,
    ``task_recognition`` and ``task_learning``; with a comparison or an update ``cosine`` of in-context and finetuning
    update and its ``excess`` over another query's. Function vectors are made from one half of the prompts and scored on
    the other, from the prompt itself only where there is a single one.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: queries with their labels, behind one or several sets of demonstrations.
        comparison: of the same prompts with finetuning updates (see `compare`).
        update: what finetuning did, to be compared here with the quick controls: one per demonstration set.
        exact: knock every head out; False for the first-order estimates alone.
        function_vectors: also score function vectors, which costs as many runs as queries times heads.
        prepend_bos: put BOS first; None for the model's default.
        seed: of shuffled labels and of the random tokens for induction.

    Raises:
        OptionError: a comparison of other queries, or a comparison and an update.
        ModelMismatchError: a comparison or an update of another model.
        PromptError: no prompts, a prompt without a label or rival candidates, or demonstrations of one label only.
    """
    wrapped, parsed = wrap(model), as_prompts(list(prompts))
    if comparison is not None and update is not None:
        raise OptionError("either a comparison or an update can be given: the comparison has its own updates.")
    if comparison is not None:
        _check_same_queries(wrapped, parsed, comparison, prepend_bos)
    if update is not None:
        comparison = compare(wrapped, parsed, update, controls="quick", prepend_bos=prepend_bos, progress=False)
    split = decompose(wrapped, parsed, zero_shot_runs="none", prepend_bos=prepend_bos)
    said = split.logits()
    last = [item.at_last_position() for item in split]
    scores = {
        "mass": torch.stack([item.softmax.mass for item in last]),
        "meta_gradient_share": torch.stack([_share(item) for item in last]),
        "zero_shot_logit": said.zero_shot,
        "meta_gradient_logit": said.meta_gradient,
        "knock_out" if exact else "first_order": _effects(wrapped, split, said.sets, exact, prepend_bos),
    }
    if function_vectors:
        scores["function_vector"] = _function_vector(wrapped, split, prepend_bos, seed)
    induction, previous = attention_scores_of_heads(wrapped, seed=seed)
    scores["induction"] = induction.expand(len(parsed), -1, -1)
    scores["previous_token"] = previous.expand(len(parsed), -1, -1)
    task = [task_scores(item, own) for item, own in zip(split, said, strict=True)]
    scores["task_recognition"] = torch.stack([recognition for recognition, _ in task])
    scores["task_learning"] = torch.stack([learning for _, learning in task])
    if comparison is not None:
        found = comparison["z total"]
        scores["cosine"] = found.values
        scores["excess"] = found.excess
    tidy = {name: values.detach().double().cpu() for name, values in scores.items()}
    return HeadProfile(wrapped.info, tidy, said.sets)


def _share(item: Decomposition) -> Float[Tensor, "layer head"]:
    """|meta-gradient| over |z|."""
    z = item.z.detach().to(item.softmax.meta_gradient)
    sizes: Tensor = item.softmax.meta_gradient.norm(dim=-1) / z.norm(dim=-1).clamp_min(torch.finfo(z.dtype).tiny)
    return sizes


def _effects(
    model: LensModel, split: DecompositionSet, sets: Tensor, exact: bool, prepend_bos: bool | None
) -> Float[Tensor, "query layer head"]:
    rows: dict[int, Tensor] = {}
    for number in sorted(set(sets.tolist())):
        members = (sets == number).nonzero()[:, 0].tolist()
        prompts = [split[i].prompt for i in members]
        effects = head_effects(model, prompts, exact=exact, prepend_bos=prepend_bos, progress=False)
        values = effects.exact if exact else effects.first_order
        rows.update(zip(members, values, strict=True))
    return torch.stack([rows[index] for index in range(len(split))])


def _check_same_queries(
    model: LensModel, prompts: Sequence[ICLPrompt], comparison: Comparison, prepend_bos: bool | None
) -> None:
    if len(comparison.sets) != len(prompts):
        raise OptionError(f"the comparison is of {len(comparison.sets)} queries, the profile of {len(prompts)}.")
    model.check_same(comparison.model, "this comparison")
    own = torch.empty(len(prompts), dtype=torch.int64)
    for number, group in enumerate(prompt_groups(tokenize_all(model, prompts, prepend_bos=prepend_bos))):
        own[group] = number
    if not torch.equal(own, comparison.sets.cpu().long()):
        raise OptionError(
            "the queries of the comparison stand behind other demonstration sets than those of the profile: give both "
            "the same prompts."
        )


def _function_vector(
    model: LensModel, split: DecompositionSet, prepend_bos: bool | None, seed: int
) -> Float[Tensor, "query layer head"]:
    """Mean outputs over one half of the prompts, put into each of the other with shuffled labels."""
    z = torch.stack([item.at_last_position().z.detach() for item in split])
    prompts = [item.prompt for item in split]
    one, other = split_queries(len(prompts), seed)
    pairs = ((one, other), (other, one)) if other else ((one, one),)
    rows: dict[int, Tensor] = {}
    for made_from, scored in pairs:
        for index in scored:
            rows[index] = function_vector_scores(
                model, [prompts[index]], z[made_from].mean(0), prepend_bos=prepend_bos, seed=seed + index
            )[0]
    return torch.stack([rows[index] for index in range(len(prompts))])


def spearman_rho(first: Float[Tensor, " item"], second: Float[Tensor, " item"]) -> Float[Tensor, ""]:
    """Spearman's rank correlation, ties given their mean rank; NaN where fewer than three values are defined or one
    side is constant.

    Args:
        first: one value per item; NaN is left out.
        second: as many.
    """
    known = ~(first.isnan() | second.isnan())
    if int(known.sum()) < 3:
        return torch.tensor(torch.nan, dtype=torch.float64)
    ranks = [_ranks(values[known].double()) for values in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    size = a.norm() * b.norm()
    return (a @ b) / size if float(size) > 0 else torch.tensor(torch.nan, dtype=torch.float64)


def _ranks(values: Float[Tensor, " item"]) -> Float[Tensor, " item"]:
    below = (values[:, None] > values).sum(-1)
    equal = (values[:, None] == values).sum(-1)
    return below + (equal + 1) / 2.0
