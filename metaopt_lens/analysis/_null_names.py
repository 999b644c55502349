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
        high: what it means if the null is as high as the similarity.
        low: what it means if the null is low.
        source: where the control comes from; empty where it is ours, or everyone's.
    """

    question: str
    what: str
    high: str
    low: str
    source: str = ""


NULLS: dict[str, Null] = {
    OTHER_QUERY: Null(
        "Is that similarity specific to the query?",
        "its excess over another query's finetuning update",
        "both updates do the same to every query: a shift, not an answer",
        "the updates agree on what they do to each query",
        "arXiv:2311.07772",
    ),
    RANDOM: Null(
        "Is it more than random directions show?",
        "its excess over random directions",
        "chance in so many dimensions explains the similarity",
        "the similarity is not chance; what it is about, other controls must say",
    ),
    RANDOM_ROTATION: Null(
        "Is it more than random rotations of the update show?",
        "its excess over those",
        "the model's own keys and values explain the similarity",
        "what finetuning changed matters",
    ),
    ANALYTIC: Null(
        "Is it more than normalisation alone gives?",
        "its excess over that",
        "normalising before subtracting explains the similarity",
        "normalisation is not all of it",
        "arXiv:2311.07772",
    ),
    CHANCE: Null(
        "Is it more than a random order gives?",
        "its excess over that",
        "a random order does as well",
        "the similarity is not chance",
    ),
    SHUFFLED_LABELS: Null(
        "Does it depend on the demonstrations' labels?",
        "its excess over randomly shuffled labels",
        "the similarity is about the format: what the labels say plays no part in it",
        "the similarity is about what the labels say",
        "arXiv:2202.12837",
    ),
    FLIPPED_LABELS: Null(
        "Does it depend on which label word stands for what?",
        "its excess over flipped labels",
        "the similarity does not know which word stands for what",
        "the similarity is about the very assignment that was learned",
        "arXiv:2303.03846",
    ),
    UNRELATED_TEXT: Null(
        "Is it more than finetuning on unrelated text shows?",
        "its excess over finetuning on unrelated text of equal norm",
        "any finetuning looks as similar",
        "the similarity is about these demonstrations, or their format",
    ),
    UPHILL: Null(
        "Is it about descending at all?",
        "its excess over the same finetuning uphill",
        "going up the gradient looks as similar: it is no evidence of descent",
        "the similarity changes with the direction, as descent must",
        "arXiv:2602.21204",
    ),
    UPHILL_EVEN: Null(
        "Is it more than what going downhill and uphill have in common?",
        "its excess over their even part",
        "what does not depend on the direction carries the similarity",
        "what changes sign with the direction carries it",
        "arXiv:2602.21204",
    ),
    UPHILL_ODD: Null(
        "",
        "its excess over the part that changes sign with the direction",
        "the similarity is that of the part that descends",
        "the similarity is not in the part that descends",
        "arXiv:2602.21204",
    ),
    **{
        name: Null(
            f"Is it more than a model with {name} shows?",
            "its excess over that model's",
            "architecture and scale explain the similarity: nothing learned is needed",
            "what the model has learned matters",
            "arXiv:2311.07772",
        )
        for name in RANDOM_WEIGHTS
    },
}
RESERVED = frozenset(NULLS) - {UNRELATED_TEXT}  # any other name is a user's control, who may replace our texts


def null_of(name: str) -> Null:
    """A null of the table, or what a control of that name asks.

    Args:
        name: of a null or of a user's control.
    """
    return NULLS.get(name) or Null(
        f"Is it more than the control “{name}” shows?",
        f"its excess over the control “{name}”",
        "what the control does explains the similarity",
        "the similarity needs more than what the control does",
    )
