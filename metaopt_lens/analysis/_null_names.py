"""The nulls and controls of a comparison by name, with the question that each of them asks."""

from __future__ import annotations

from dataclasses import dataclass

OTHER_QUERY = "other query"
RANDOM = "random"
RANDOM_ROTATION = "rotated"
ANALYTIC = "analytic"
CHANCE = "chance"
SHUFFLED_LABELS = "shuffled labels"
FLIPPED_LABELS = "flipped labels"
UNRELATED_TEXT = "unrelated text"
UPHILL, UPHILL_ODD, UPHILL_EVEN = "uphill", "uphill, odd part", "uphill, even part"
RANDOM_WEIGHTS = ("random weights", "random weights, trained embeddings")


@dataclass(frozen=True)
class Null:
    """What the excess of a similarity over a null answers.

    Attributes:
        question: in words; empty for what is shown next to the nulls and is none.
        what: the excess, as it is called in a sentence.
    """

    question: str
    what: str


NULLS: dict[str, Null] = {
    OTHER_QUERY: Null("Is that similarity specific to the query?", "its excess over another query's finetuning update"),
    RANDOM: Null("Is it more than random directions show?", "its excess over random directions"),
    RANDOM_ROTATION: Null("Is it more than random rotations of the update show?", "its excess over those"),
    ANALYTIC: Null("Is it more than normalisation alone gives?", "its excess over that"),
    CHANCE: Null("Is it more than a random order gives?", "its excess over that"),
    SHUFFLED_LABELS: Null("Does it depend on the demonstrations' labels?", "its excess over randomly shuffled labels"),
    FLIPPED_LABELS: Null("Does it depend on which label word stands for what?", "its excess over flipped labels"),
    UPHILL: Null("Is it about descending at all?", "its excess over the same finetuning uphill"),
    UPHILL_EVEN: Null(
        "Is it more than what going downhill and uphill have in common?", "its excess over their even part"
    ),
    UPHILL_ODD: Null("", "its excess over the part that changes sign with the direction"),
    **{
        name: Null(f"Is it more than a model with {name} shows?", "its excess over that model's")
        for name in RANDOM_WEIGHTS
    },
}
RESERVED = frozenset(NULLS)  # any other name is a user's control


def null_of(name: str) -> Null:
    """A null of the table, or what a control of that name asks.

    Args:
        name: of a null or of a user's control.
    """
    return NULLS.get(name) or Null(
        f"Is it more than the control “{name}” shows?", f"its excess over the control “{name}”"
    )
