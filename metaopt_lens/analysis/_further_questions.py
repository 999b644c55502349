"""The further results of a comparison as questions with a number per query."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from metaopt_lens.analysis._algebra import OTHER_TASK, SCALED_SUM
from metaopt_lens.analysis._ceiling import CEILING, CONSTANT, SCALED
from metaopt_lens.analysis._further import Further
from metaopt_lens.analysis._held_out import Explained
from metaopt_lens.analysis._ladder import GRADIENT_DESCENT
from metaopt_lens.analysis._order import IN_CONTEXT, ONE_PASS

FURTHER = "further questions"  # what logs call the time they took


class Question(NamedTuple):
    """What is asked, and the values whose mean answers it: yes above 0, no below; what either means, and the source."""

    key: str
    text: str
    what: str
    values: Float[Tensor, " query"]
    high: str
    low: str
    source: str


def further_questions(found: Further) -> list[Question]:
    """One for each result there is.

    Args:
        found: of a comparison.
    """
    questions = []
    if found.ceiling is not None:
        own, sets = found.ceiling["value"], found.ceiling.sets
        best = float(found.ceiling.r_squared(CEILING).estimate)
        what = (
            f"the held-out R^2 of finetuning's update, scaled, less that of one constant vector (a change of the value "
            f"projection can reach R^2 {best:.2f})"
        )
        text = "Does finetuning explain the in-context updates better than one constant vector?"
        high = "what finetuning does to a query is a part of what the demonstrations do to it"
        low = "finetuning does not even have the constant shift that the demonstrations put on every query"
        values = _less(own, sets, SCALED, CONSTANT)
        questions.append(Question("ceiling", text, what, values, high, low, "arXiv:2509.22621"))
    if found.ladder is not None:
        text = "Does one step of gradient descent on the demonstrations explain them better than one constant vector?"
        what = "the held-out R^2 of gamma dW_ICL q less that of one constant vector"
        values = _less(found.ladder.explained, found.ladder.sets, GRADIENT_DESCENT, CONSTANT)
        high = "heads act on a query as a gradient step with a step size would"
        low = "a shift that is the same for every query explains more than a gradient step"
        questions.append(Question("ladder", text, what, values, high, low, "arXiv:2306.00297"))
    if found.order is not None:
        text = "Does the order of the demonstrations matter more in context than in one pass of SGD?"
        what = "the spread of in-context updates over orders less that of SGD's"
        spread = {name: t.nanmean((1, 2)) for name, t in found.order.updates.items()}
        high = "in-context learning depends on the order as no gradient descent over these examples does"
        low = "its dependence on the order is within that of online gradient descent"
        values = spread[IN_CONTEXT] - spread[ONE_PASS]
        questions.append(Question("order", text, what, values, high, low, "arXiv:2310.08540"))
    if found.algebra is not None:
        own, sets = found.algebra.additivity, found.algebra.sets
        null, name = (OTHER_TASK, "another task's") if OTHER_TASK in own.errors else (CONSTANT, "one constant vector")
        text = f"Do the demonstrations' own updates add up to theirs together, better than {name}?"
        what = f"the held-out R^2 of their scaled sum less that of {name}{'' if null == CONSTANT else ' sum'}"
        high = "demonstrations add up, as the terms of a gradient do"
        low = "what demonstrations do together is not made of what each does alone"
        values = _less(own, sets, SCALED_SUM, null)
        questions.append(Question("algebra", text, what, values, high, low, "arXiv:2605.16591"))
    return questions


def _less(own: Explained, sets: Tensor, first: str, second: str) -> Float[Tensor, " query"]:
    """R^2 of one predictor less that of another, mean over sites."""
    return (own.r_squared(first, sets) - own.r_squared(second, sets)).nanmean((1, 2))
