"""Do in-context learning and finetuning follow relabelled demonstrations? (docs/theory.md, section 14)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import NonFiniteError, OptionError, PromptError
from metaopt_lens._plots import draw
from metaopt_lens.analysis._demo_sets import DemoSet, group_sets
from metaopt_lens.analysis._interval import mean_interval
from metaopt_lens.analysis._label_answers import Choices, Words
from metaopt_lens.analysis._relabel import LABEL_WORDS, LabelWords, label_map, relabelled
from metaopt_lens.finetuning import finetune, require_raw_weights
from metaopt_lens.models import LensModel, ModelInfo, wrap
from metaopt_lens.prompts import PromptLike, as_prompts
from metaopt_lens.runs import Scoring, candidate_labels, refuse_acting, run_shared_prefix, tokenize_all

if TYPE_CHECKING:
    import pandas as pd

ICL = "in context"
LEARNERS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "full-batch": {"batch_size": None},
    "layer-causal": {"layer_causal": True},
}
RATES = (0.0005, 0.002, 0.01, 0.05, 0.2)


@dataclass(frozen=True, eq=False)
class Followed:
    """What one learner answers behind, or after, demonstrations with some label words.

    Attributes:
        labels: of the demonstrations: ``natural``, ``flipped`` or ``neutral``.
        learner: ``in context``, ``SGD``, ``full-batch`` or ``layer-causal``.
        lr: learning rate; 0 in context.
        shown: of every query, whether the answer is what the demonstrations show.
        natural: whether it is the natural label.
    """

    labels: LabelWords
    learner: str
    lr: float
    shown: Bool[Tensor, " query"]
    natural: Bool[Tensor, " query"]


@dataclass(frozen=True, eq=False, repr=False)
class LabelFollowing(Stored):
    """Accuracy against what the demonstrations show and against the natural labels.

    Attributes:
        model: what was asked.
        rows: of every kind of label words, learner and learning rate.
        sets: which demonstration set each query belongs to.
        notes: learning rates that are left out, as they diverge.
    """

    kind: ClassVar[str] = "label-following"

    model: ModelInfo
    rows: tuple[Followed, ...]
    sets: Int[Tensor, " query"]
    notes: tuple[str, ...] = ()

    def to_frame(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row per kind of label words, learner, learning rate and what is compared with, with t intervals.

        Args:
            level: coverage of the intervals over demonstration sets.
        """
        import pandas as pd

        table = []
        for row in self.rows:
            for against, hits in (("shown", row.shown), ("natural", row.natural)):
                found = mean_interval(hits.double(), sets=self.sets, level=level)
                low, high = (float(end.clamp(0, 1)) for end in (found.low, found.high))
                about = {"labels": row.labels, "learner": row.learner, "lr": row.lr, "against": against}
                table.append({**about, "accuracy": float(found.estimate), "low": low, "high": high})
        return pd.DataFrame(table)

    def plot(self) -> Any:
        """Accuracy over learning rates, one panel for each kind of label words (plotly)."""
        return draw(self, "plot")

    def __repr__(self) -> str:
        n_sets = len(set(self.sets.tolist()))
        kinds = ", ".join(dict.fromkeys(row.labels for row in self.rows))
        return f"LabelFollowing({self.model.name}: {kinds} labels, {len(self.sets)} queries, {n_sets} sets)"


def follow_labels(
    model: Any,
    prompts: PromptLike | Sequence[PromptLike],
    *,
    labels: Sequence[LabelWords] = LABEL_WORDS,
    shown_as: Mapping[str, str] | None = None,
    rates: Sequence[float] = RATES,
    epochs: int = 1,
    scoring: Scoring = "mean",
    prepend_bos: bool | None = None,
    allow_processed: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
) -> LabelFollowing:
    """Ask the queries behind demonstrations with other label words, and after finetuning on them.

    Whoever learns from the demonstrations answers with the words they show; whoever only recognises the task keeps to
    the natural ones (after arXiv:2511.21038). Answers are chosen among the natural and the new words together.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model; never modified.
        prompts: queries with their natural labels, in the forms `decompose` takes; at least two behind each set of
            demonstrations.
        labels: which label words.
        shown_as: which word stands for each label word, in place of a draw; for all sets and all but natural labels.
        rates: learning rates of SGD, full-batch and layer-causal finetuning; those that diverge are left out by name.
        epochs: passes over the demonstrations.
        scoring: of label words, ``"mean"`` log-probability of their tokens or the ``"first"`` token's.
        prepend_bos: put BOS first; None for the model's default.
        allow_processed: accept a model with folded norms or biases.
        batch_size: queries run together; by default as many as memory allows.
        seed: of the permutations and of neutral words; the set's number is added.

    Returns:
        A `LabelFollowing`, its queries grouped by demonstration set.

    Raises:
        PromptError: a query without a label, open answers, or a single label word.
        OptionError: no learning rates, or one that is not positive.
    """
    if not rates or min(rates) <= 0:
        raise OptionError(f"rates must be positive numbers, at least one, got {list(rates)}.")
    unknown = [kind for kind in labels if kind not in LABEL_WORDS]
    if unknown or not labels:
        raise OptionError(f"labels must be some of {', '.join(map(repr, LABEL_WORDS))}, got {list(labels)}.")
    wrapped = wrap(model)
    refuse_acting(wrapped, "follow_labels")
    require_raw_weights(wrapped, allow_processed=allow_processed)
    groups = group_sets(wrapped, as_prompts(prompts), prepend_bos=prepend_bos)
    maps = [_maps(wrapped, group, labels, seed + number, shown_as) for number, group in enumerate(groups)]
    options: dict[str, Any] = {"prepend_bos": prepend_bos, "allow_processed": allow_processed}
    asked = [
        [_Asked.of(wrapped, group, own[kind], scoring, batch_size, options) for kind in labels]
        for group, own in zip(groups, maps, strict=True)
    ]
    rows, notes = [], []
    for i, kind in enumerate(labels):
        of_kind = [found[i] for found in asked]
        rows.append(_row(kind, ICL, 0.0, [own.in_context() for own in of_kind]))
        for learner, how in LEARNERS.items():
            for lr in rates:
                try:
                    found = [own.learned(lr=lr, epochs=epochs, **how) for own in of_kind]
                except NonFiniteError:
                    notes.append(f"{learner} finetuning on {kind} labels diverges at learning rate {lr:g}: left out")
                    continue
                rows.append(_row(kind, learner, lr, found))
    sets = torch.cat([torch.full((len(group.prompts),), i) for i, group in enumerate(groups)])
    return LabelFollowing(wrapped.info, tuple(rows), sets, tuple(notes))


def join_following(parts: Sequence[LabelFollowing]) -> LabelFollowing:
    """All demonstration sets of several results; learning rates that not every one has are dropped.

    Args:
        parts: with the same kinds of label words.
    """
    by_name = [{(row.labels, row.learner, row.lr): row for row in part.rows} for part in parts]
    rows = []
    for name in by_name[0]:
        found = [rows_of[name] for rows_of in by_name if name in rows_of]
        if len(found) == len(parts):
            shown, natural = (torch.cat([getattr(row, hits) for row in found]) for hits in ("shown", "natural"))
            rows.append(Followed(*name, shown, natural))
    counts = [0, *(int(part.sets.max()) + 1 for part in parts)]
    sets = torch.cat([part.sets + sum(counts[: i + 1]) for i, part in enumerate(parts)])
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return LabelFollowing(parts[0].model, tuple(rows), sets, notes)


_Hits = tuple[Bool[Tensor, " query"], Bool[Tensor, " query"]]


def _row(labels: LabelWords, learner: str, lr: float, found: Sequence[_Hits]) -> Followed:
    shown, natural = (torch.cat(hits) for hits in zip(*found, strict=True))
    return Followed(labels, learner, lr, shown, natural)


def _maps(
    model: LensModel,
    group: DemoSet,
    labels: Sequence[LabelWords],
    seed: int,
    given: Mapping[str, str] | None,
) -> dict[LabelWords, dict[str, str]]:
    """The new word of each label word, by kind."""
    shown = {demo.label for demo in group.prompts[0].demos}
    for prompt in group.prompts:
        if prompt.label is None:
            raise PromptError(f"query {prompt.query!r} has no label to compare with: ICLPrompt(..., label=...).")
        if prompt.label not in shown:
            raise PromptError(
                f"no demonstration shows the label {prompt.label!r} of query {prompt.query!r}, so nothing says what it "
                "would be called: add a demonstration, or leave the query out."
            )
    return {
        kind: label_map(model, group.prompts, kind, seed=seed) if given is None or kind == "natural" else dict(given)
        for kind in labels
    }


@dataclass(frozen=True, eq=False)
class _Asked:
    """One set's queries with some label words."""

    model: LensModel
    group: DemoSet
    choices: Choices
    shown: Int[Tensor, " query"]
    natural: Int[Tensor, " query"]
    batch_size: int | None
    options: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: LensModel,
        group: DemoSet,
        words: dict[str, str],
        scoring: Scoring,
        batch_size: int | None,
        options: dict[str, Any],
    ) -> _Asked:
        """Both the natural and the new words can be answered."""
        prompts = [relabelled(prompt, words) for prompt in group.prompts]
        bos = options["prepend_bos"]
        tokenized = tokenize_all(model, prompts, prepend_bos=bos, require_demos=True)
        moved = DemoSet(list(range(len(prompts))), prompts, tokenized)
        both = [
            tuple(dict.fromkeys([*candidate_labels(old), *candidate_labels(new)]))
            for old, new in zip(group.prompts, prompts, strict=True)
        ]
        names = tuple(dict.fromkeys(word for own in both for word in own))
        choices = Choices.of(model, moved, Words(names, tuple(both)), scoring=scoring)
        shown, natural = (
            torch.tensor([names.index(str(p.label)) for p in source]) for source in (prompts, group.prompts)
        )
        return cls(model, moved, choices, shown, natural, batch_size, options)

    def in_context(self) -> _Hits:
        """Behind the demonstrations."""
        first = self.group.tokenized[0]
        return self._hits(first.ids[: first.query.start])

    def learned(self, **how: Any) -> _Hits:
        """Zero-shot, after finetuning on them."""
        update = finetune(self.model, self.group.prompts[0], progress=False, **how, **self.options)
        first = self.group.tokenized[0]
        with update.applied(self.model):
            return self._hits(first.ids[: first.demonstrations.start])

    def _hits(self, before: Sequence[int]) -> _Hits:
        prefix = run_shared_prefix(self.model, before)
        best = self.choices.answers(self.model, prefix, batch_size=self.batch_size).best
        return best == self.shown, best == self.natural
