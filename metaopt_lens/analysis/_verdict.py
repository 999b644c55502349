"""What a comparison says, in plain words with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import UndefinedMetricError
from metaopt_lens.analysis._comparison import Comparison

Answer = Literal["yes", "no", "unclear"]


@dataclass(frozen=True)
class Finding:
    """One question with its answer: ``yes`` if the 95 % interval lies above 0, ``no`` if below, else ``unclear``.

    Attributes:
        what: the quantity that estimate, low and high are of.
    """

    question: str
    answer: Answer
    what: str
    estimate: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        """Answer and numbers."""
        lead = {"yes": "Yes", "no": "No, the opposite", "unclear": "Not shown"}[self.answer]
        return f"{lead}: {self.what} is {self.estimate:+.3f} (95 % interval {self.low:+.3f} to {self.high:+.3f})."


def findings(comparison: Comparison, statistic: str = "z total") -> tuple[Finding, ...]:
    """The questions a reader asks first, answered from a comparison (docs/theory.md, section 4).

    Means over layers and heads; intervals by the hierarchical bootstrap, over demonstration sets only if there are
    several (`Comparison.scope`). Questions whose runs were not made are left out.
    """
    found = []
    try:
        right = {name: hits.double() for name, hits in comparison.correct().items()}
    except UndefinedMetricError:
        pass
    else:
        found.append(
            _finding(
                comparison,
                "Does the model learn in context?",
                "the gain in accuracy over zero-shot",
                right["ICL"] - right["ZS"],
            )
        )
        found.append(
            _finding(
                comparison,
                "Does finetuning on the same demonstrations help?",
                "the gain in accuracy over zero-shot",
                right["FT"] - right["ZS"],
            )
        )
    chosen = comparison[statistic]
    mean = chosen.values.nanmean((1, 2))
    found.append(
        _finding(
            comparison,
            "Do the in-context and the finetuning update point the same way?",
            "their mean cosine over all heads",
            mean,
        )
    )
    for null, question, what in (
        ("shuffled", "Is that similarity specific to the query?", "its excess over another query's finetuning update"),
        ("label-shuffled", "Does it depend on the demonstrations' labels?", "its excess over shuffled labels"),
    ):
        if null in chosen.nulls:
            found.append(_finding(comparison, question, what, mean - chosen.nulls[null].nanmean((1, 2))))
    for null in chosen.nulls:
        if null.startswith("unrelated"):
            question = "Is it more than any finetuning of this size would give?"
            excess = mean - chosen.nulls[null].nanmean((1, 2))
            found.append(_finding(comparison, question, "its excess over finetuning on unrelated text", excess))
        if null.startswith("random weights"):
            question = f"Is it more than a model with {null} shows?"
            excess = mean - chosen.nulls[null].nanmean((1, 2))
            found.append(_finding(comparison, question, "its excess over that model's", excess))
    aou = comparison["SimAOU"]
    excess = (aou.values - aou.nulls["analytic"]).nanmean((1, 2))
    found.append(
        _finding(comparison, "Is the published SimAOU above what its normalisation alone gives?", "its excess", excess)
    )
    return tuple(found)


def headline(answers: tuple[Finding, ...]) -> str:
    """The findings in one or two sentences, no stronger than they are."""
    by_question = {f.question: f.answer for f in answers}
    same_way = by_question["Do the in-context and the finetuning update point the same way?"]
    controls = {q: a for q, a in by_question.items() if q.startswith(("Is that", "Does it", "Is it more"))}
    failed = [q for q, a in controls.items() if a != "yes"]
    if same_way == "no":
        return "In-context learning and finetuning move the heads in opposite directions on average."
    if same_way == "unclear":
        return "No common direction of the in-context and the finetuning updates is shown."
    if not failed:
        return (
            "The in-context updates resemble the finetuning updates, beyond every control that was run. That is what a "
            "hidden gradient descent would look like; it does not prove one."
        )
    return (
        f"The in-context updates resemble the finetuning updates, but over {len(failed)} of {len(controls)} controls "
        "no excess is shown: the similarity by itself is no evidence of a hidden gradient descent."
    )


def _finding(comparison: Comparison, question: str, what: str, values: Float[Tensor, " query"]) -> Finding:
    found = comparison.interval(values)
    low, high = float(found.low), float(found.high)
    answer: Answer = "yes" if low > 0 else "no" if high < 0 else "unclear"
    return Finding(question, answer, what, float(found.estimate), low, high)
