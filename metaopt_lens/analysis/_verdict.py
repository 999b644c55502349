"""What a comparison says, in plain words with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis._further_questions import further_questions
from metaopt_lens.analysis._interval import MIN_SETS_TO_DECIDE, scope
from metaopt_lens.analysis._measured import Measured
from metaopt_lens.analysis._null_names import ANALYTIC, FLIPPED_LABELS, SHUFFLED_LABELS, null_of
from metaopt_lens.analysis._pairs import part_name

if TYPE_CHECKING:
    from metaopt_lens.analysis._comparison import Comparison

Answer = Literal["yes", "no", "unclear", "undecided"]
Outcome = Literal["one set", "not interpreted", "opposite", "not shown", "no control", "beyond all", "not beyond all"]

LEARNING, FINETUNING, DIRECTION, PUBLISHED = "in_context_learning", "finetuning", "direction", "sim_aou"
PRIOR = "prior"
_CONTROL = "control:"
_LEVEL = 0.05


@dataclass(frozen=True)
class Finding:
    """One question with its answer.

    Attributes:
        key: ``in_context_learning``, ``finetuning``, ``prior`` (with flipped labels), ``direction``, ``control:NAME``
            for each null, ``sim_aou``; with further results ``ceiling``, ``ladder``, ``order``, ``algebra``.
        question: in words.
        answer: ``yes`` if the 95 % interval lies above 0, ``no`` if below, ``unclear`` if it holds 0; ``undecided``
            where the data cannot say: see `because`.
        what: the quantity that estimate, low and high are of.
        estimate, low, high: NaN where undefined.
        n_sets: demonstration sets behind it.
        because: why it is undecided; empty otherwise.
        test: what decides where the sets agree exactly and there is no interval; empty otherwise.
    """

    key: str
    question: str
    answer: Answer
    what: str
    estimate: float
    low: float
    high: float
    n_sets: int
    because: str = ""
    test: str = ""

    @property
    def control(self) -> str | None:
        """Name of the null that the similarity is compared with, if that is the question."""
        return self.key.removeprefix(_CONTROL) if self.key.startswith(_CONTROL) else None

    @property
    def sentence(self) -> str:
        """Answer and numbers."""
        lead = {
            "yes": "Yes",
            "no": "No, the opposite",
            "unclear": "Not shown",
            "undecided": f"Undecided, as {self.because}",
        }[self.answer]
        if self.estimate != self.estimate:
            return f"{lead}."
        return f"{lead}: {self.what} is {self.estimate:+.3f} ({self.interval_text})."

    @property
    def interval_text(self) -> str:
        """The interval and what it speaks about, or why there is none."""
        if self.test:
            return f"{self.test}; {scope(self.n_sets)}"
        if self.low != self.low:
            return f"no interval: all values are equal, or there is one; {scope(self.n_sets)}"
        return f"95 % interval {self.low:+.3f} to {self.high:+.3f}, {scope(self.n_sets)}"


def findings(comparison: Comparison, statistic: str = "z total") -> tuple[Finding, ...]:
    """The questions a reader asks first, answered from a comparison (docs/theory.md, section 4).

    The first two say whether the model learns in context and whether finetuning helps. Where either is not shown, the
    similarities after them are not interpreted: they are undecided. So is everything behind a single demonstration set.

    Args:
        comparison: means over layers and heads, t intervals over demonstration sets.
        statistic: whose similarity is asked about; each of its nulls has a question. That about shuffled labels is
            answered on the contrast part of output space, where updates were split.
    """
    learning = _learning(comparison)
    failed = not_working(learning)
    why = "" if not failed else f"it is not shown that {' and that '.join(failed)}"
    chosen = comparison[statistic]
    mean = chosen.values.nanmean((1, 2))
    questions: list[tuple[str, str, str, Tensor]] = [
        (
            DIRECTION,
            "Do the in-context and the finetuning update point the same way?",
            "their mean cosine over all heads",
            mean,
        )
    ]
    for name, null in chosen.nulls.items():
        asked = null_of(name)
        if not asked.question:
            continue
        asked_of, what = _where_labels_show(comparison, chosen, name), asked.what
        if asked_of is not chosen:
            what, null = f"{what} in the contrast part", asked_of.nulls[name]
        questions.append((f"{_CONTROL}{name}", asked.question, what, (asked_of.values - null).nanmean((1, 2))))
    aou = comparison["SimAOU"]
    excess = (aou.values - aou.nulls[ANALYTIC]).nanmean((1, 2))
    question = "Is the published SimAOU above what its normalisation alone gives?"
    questions.append((PUBLISHED, question, "its excess", excess))
    if comparison.further is not None:
        questions += [(q.key, q.text, q.what, q.values) for q in further_questions(comparison.further)]
    rest = (_finding(comparison, *row, because=why) for row in questions)
    return (*learning, *_against_the_prior(comparison), *rest)


def _where_labels_show(comparison: Comparison, whole: Measured, null: str) -> Measured:
    """For the labels' own control the contrast part: what says which label. Otherwise, and without parts, the whole."""
    name = part_name(whole.name, "contrast")
    if null != SHUFFLED_LABELS or all(s.name != name for s in comparison.statistics):
        return whole
    part = comparison[name]
    known = null in part.nulls and bool((part.values - part.nulls[null]).isfinite().any())
    return part if known else whole


_WORKS = ("the model learns in context", "finetuning helps")


def _learning(comparison: Comparison) -> tuple[Finding, Finding]:
    """Accuracy in context and finetuned against zero-shot, paired by queries and sets."""
    asked = (
        (LEARNING, "Does the model learn in context?", "ICL"),
        (FINETUNING, "Does finetuning on the same demonstrations help?", "FT"),
    )
    why = ""
    try:
        right = {name: hits.double() for name, hits in comparison.correct().items()}
    except UndefinedMetricError as error:
        why = str(error).split(":")[0]
        right = {name: torch.full((len(comparison.sets),), torch.nan).double() for name in ("ZS", "ICL", "FT")}
    first, second = (_gain(comparison, key, question, right[name] - right["ZS"], why) for key, question, name in asked)
    return first, second


def _against_the_prior(comparison: Comparison) -> tuple[Finding, ...]:
    """Behind flipped labels: more answers as the demonstrations show than as the words are usually used."""
    answers, gold, flipped = (
        comparison.controlled.get(f"ICL, {FLIPPED_LABELS}"),
        comparison.gold,
        comparison.flipped_gold,
    )
    if answers is None or gold is None or flipped is None:
        return ()
    more = ((answers == flipped).double() - (answers == gold).double()).mean(0)
    defined = (flipped >= 0) & (gold >= 0)  # open answers cannot be flipped
    if not bool(defined.any()):
        return ()
    more = torch.where(defined, more, torch.nan)
    what = "behind flipped labels, the accuracy against the flipped minus that against the natural labels"
    question = "Does it follow the demonstrations against its prior?"
    return (_gain(comparison, PRIOR, question, more, "", what),)


def _gain(
    comparison: Comparison,
    key: str,
    question: str,
    gain: Float[Tensor, " query"],
    why: str,
    what: str = "the gain in accuracy over zero-shot",
) -> Finding:
    """A gain in accuracy. Sets that agree exactly (a model that is always right) give no interval: then the queries
    decide, by an exact sign test on those of one set, as other sets may ask the same ones."""
    found = _finding(comparison, key, question, what, gain, why)
    means = [gain[comparison.sets == index] for index in sorted(set(comparison.sets.tolist()))]
    equal = len({float(values.nanmean()) for values in means}) == 1
    if why or comparison.n_sets < MIN_SETS_TO_DECIDE or not equal or found.estimate != found.estimate:
        return found
    p = max(_sign_test(values) for values in means)
    test = f"the same in every set, so there is no interval; exact sign test on one set's queries, p = {p:.2g}"
    answer: Answer = "unclear" if p >= _LEVEL else "yes" if found.estimate > 0 else "no"
    return replace(found, answer=answer, because="", test=test)


def _sign_test(gains: Float[Tensor, " query"]) -> float:
    """Two-sided exact p of as many queries gained as lost."""
    from scipy import stats

    won, lost = int((gains > 0).sum()), int((gains < 0).sum())
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def outcome(answers: Sequence[Finding]) -> Outcome:
    """What the findings come to.

    Args:
        answers: of `findings`.

    Returns:
        ``one set``: undecided; ``not interpreted``: in-context learning or finetuning is not shown to work;
        ``opposite``, ``not shown``: what is said of a common direction; where there is one, ``no control`` was run, or
        it is ``beyond all`` or ``not beyond all`` of them.
    """
    by_key = {f.key: f for f in answers}
    if answers[0].n_sets < MIN_SETS_TO_DECIDE:
        return "one set"
    if not_working(answers):
        return "not interpreted"
    same_way = by_key[DIRECTION].answer
    if same_way != "yes":
        return "opposite" if same_way == "no" else "not shown"
    if all(f.control is None for f in answers):
        return "no control"
    return "not beyond all" if not_beyond(answers) else "beyond all"


def not_working(answers: Sequence[Finding]) -> list[str]:
    """What is not shown of "the model learns in context" and "finetuning helps".

    Args:
        answers: of `findings`.
    """
    by_key = {f.key: f for f in answers}
    return [name for key, name in zip((LEARNING, FINETUNING), _WORKS, strict=True) if by_key[key].answer != "yes"]


def not_beyond(answers: Sequence[Finding]) -> list[str]:
    """Controls over which no excess of the similarity is shown.

    Args:
        answers: of `findings`.
    """
    return [f.control for f in answers if f.control is not None and f.answer != "yes"]


def headline(answers: Sequence[Finding]) -> str:
    """The findings in one or two sentences, no stronger than they are.

    Args:
        answers: of `findings`.
    """
    sets = scope(answers[0].n_sets)
    match outcome(answers):
        case "one set":
            return (
                "Undecided: there is one demonstration set, and nothing is known of how another would do. Compare "
                "behind several sets, better five or more."
            )
        case "not interpreted":
            return (
                f"It is not shown that {', nor that '.join(not_working(answers))} ({sets}): the similarities are not "
                "interpreted, as there is nothing that they could explain."
            )
        case "opposite":
            return f"In-context learning and finetuning move the heads in opposite directions on average ({sets})."
        case "not shown":
            return f"No common direction of the in-context and the finetuning updates is shown ({sets})."
        case "no control":
            return f"The in-context updates resemble the finetuning updates ({sets}); no control was run."
        case "beyond all":
            return (
                "The in-context updates resemble the finetuning updates, beyond every control that was run "
                f"({sets}). That is what a hidden gradient descent would look like; it does not prove one."
            )
        case "not beyond all":
            missed, n = not_beyond(answers), sum(f.control is not None for f in answers)
            return (
                f"The in-context updates resemble the finetuning updates, but over {len(missed)} of {n} controls "
                f"({', '.join(missed)}) no excess is shown ({sets}): the similarity by itself is no evidence of a "
                "hidden gradient descent."
            )


def _finding(
    comparison: Comparison, key: str, question: str, what: str, values: Float[Tensor, " query"], because: str = ""
) -> Finding:
    found = comparison.interval(values)
    low, high = float(found.low), float(found.high)
    if comparison.n_sets < MIN_SETS_TO_DECIDE:
        because = "there is one demonstration set"
    elif not because and low != low:
        because = "there is no interval"
    answer: Answer = "undecided" if because else "yes" if low > 0 else "no" if high < 0 else "unclear"
    return Finding(key, question, answer, what, float(found.estimate), low, high, comparison.n_sets, because)
