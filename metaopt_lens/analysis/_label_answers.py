"""What a model answers to the queries of a comparison, among candidates and in absolute numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._errors import PromptError
from metaopt_lens.analysis._demo_sets import DemoSet
from metaopt_lens.models import LensModel, Prefix
from metaopt_lens.prompts import ICLPrompt, tokenize_label
from metaopt_lens.runs import (
    Run,
    Scoring,
    candidate_labels,
    candidate_mass,
    check_candidates,
    read_queries,
    scored_tokens,
)


@dataclass(frozen=True, eq=False)
class Answers:
    """What is answered to some queries in one setting.

    Attributes:
        best: the candidate with the highest score among the query's own, counted among all label words.
        candidate_mass: probability that the answer begins with one of the query's candidates.
        label_rank: rank of the right label's first token in the whole vocabulary; -1 where it is not known.
    """

    best: Int[Tensor, " query"]
    candidate_mass: Float[Tensor, " query"]
    label_rank: Int[Tensor, " query"]

    def __getitem__(self, queries: Int[Tensor, " chosen"]) -> Answers:
        """Those of some queries, in that order."""
        return Answers(self.best[queries], self.candidate_mass[queries], self.label_rank[queries])


def join_answers(parts: Sequence[Answers]) -> Answers:
    """The answers to successive groups of queries.

    Args:
        parts: one for each group.
    """
    best, mass, rank = zip(*((p.best, p.candidate_mass, p.label_rank) for p in parts), strict=True)
    return Answers(torch.cat(best), torch.cat(mass), torch.cat(rank))


@dataclass(frozen=True)
class Words:
    """The label words of all prompts, and which of them each prompt chooses among.

    Attributes:
        names: all of them.
        own: of every prompt.
    """

    names: tuple[str, ...]
    own: tuple[tuple[str, ...], ...]


def label_words(prompts: Sequence[ICLPrompt], given: Sequence[str] | None) -> Words | None:
    """What each query chooses among; None if one has nothing to choose among: fewer than two label words.

    Args:
        prompts: all queries.
        given: the candidates of all; by default each prompt's own (see `candidate_labels`).

    Raises:
        PromptError: a gold label that is no candidate.
    """
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
    return Words(names, own)


@dataclass(frozen=True, eq=False)
class Choices:
    """What the queries of one demonstration set choose among.

    Attributes:
        labels: tokens of all label words that are scored.
        own: of every query, its candidates among them.
        gold: its right label (-1 where not known).
        queries: token ids of every query.
    """

    labels: list[tuple[int, ...]]
    own: list[list[int]]
    gold: list[int]
    queries: list[tuple[int, ...]]

    @classmethod
    def of(cls, model: LensModel, group: DemoSet, words: Words, *, scoring: Scoring) -> Choices:
        """The choices of one set's queries.

        Args:
            model: a wrapped model.
            group: the set.
            words: of all prompts.
            scoring: of label words.

        Raises:
            PromptError: candidates that cannot be told apart.
        """
        template = group.prompts[0].template
        ids = {name: tokenize_label(name, template, model.tokenizer) for name in words.names}
        for own in dict.fromkeys(words.own[index] for index in group.indices):
            check_candidates([ids[name] for name in own], own, scoring=scoring)
        return cls(
            labels=[scored_tokens(ids[name], scoring) for name in words.names],
            own=[[words.names.index(name) for name in words.own[index]] for index in group.indices],
            gold=[gold_of(p, words.names) for p in group.prompts],
            queries=[t.ids[t.query.start :] for t in group.tokenized],
        )

    def answers(
        self, model: LensModel, prefix: Prefix | None, rows: Sequence[int] | None = None, batch_size: int | None = None
    ) -> Answers:
        """What a model answers behind a prefix.

        Args:
            model: a wrapped model, with whatever is to act on it.
            prefix: what stands before the queries.
            rows: which queries; all of them if not given.
            batch_size: queries run together; by default as many as memory allows.
        """
        rows = range(len(self.queries)) if rows is None else rows
        queries = [self.queries[row] for row in rows]
        readings = read_queries(model, prefix, queries, self.labels, n_top=1, batch_size=batch_size)
        scores, log_probs, ranks = zip(*((r.scores, r.log_probs, r.ranks) for r in readings), strict=True)
        return self._chosen(rows, scores, log_probs, ranks)

    @property
    def first_tokens(self) -> list[tuple[int, ...]]:
        """Of every query: the different first tokens of its candidates, in order."""
        return [tuple(sorted({self.labels[i][0] for i in own})) for own in self.own]

    @property
    def asked(self) -> tuple[int, ...]:
        """The labels' tokens where each has one: then recorded runs say all (`recorded`). Empty otherwise."""
        return tuple(label[0] for label in self.labels) if all(len(label) == 1 for label in self.labels) else ()

    def recorded(self, runs: Sequence[Run], rows: Sequence[int]) -> Answers:
        """What is answered at the last token of recorded runs that kept the logits of `asked`.

        Args:
            runs: of the queries, in one setting.
            rows: which queries.
        """
        log_probs, ranks = [], []
        for run in runs:
            assert run.logits is not None
            assert run.log_normaliser is not None
            assert run.ranks is not None
            log_probs.append((run.logits[-1] - run.log_normaliser[-1]).double().cpu())
            ranks.append(run.ranks[-1].cpu())
        return self._chosen(rows, log_probs, log_probs, ranks)

    def _chosen(
        self,
        rows: Sequence[int],
        scores: Sequence[Float[Tensor, " candidate"]],
        log_probs: Sequence[Float[Tensor, " candidate"]],
        ranks: Sequence[Int[Tensor, " candidate"]],
    ) -> Answers:
        best, mass, rank = [], [], []
        for i, row in enumerate(rows):
            among, right = self.own[row], self.gold[row]
            best.append(among[int(scores[i][among].argmax())])
            mass.append(candidate_mass(log_probs[i][among], [self.labels[j] for j in among]))
            rank.append(-1 if right < 0 else int(ranks[i][right]))
        return Answers(torch.tensor(best), torch.tensor(mass, dtype=torch.float64), torch.tensor(rank))


def gold_of(prompt: ICLPrompt, names: Sequence[str]) -> int:
    """Index of a prompt's label among the label words; -1 where it has none.

    Args:
        prompt: any.
        names: the label words.
    """
    return -1 if prompt.label is None else names.index(prompt.label)
