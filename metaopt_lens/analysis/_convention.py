"""How the published programs' choices differ from the default ones: `Convention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Convention:
    """What a metric does where its definition leaves a choice.

    `Convention.DEFAULT` leaves out what is undefined and ignores rounding. `Convention.PUBLISHED` reproduces the
    programs of Dai et al. (arXiv 2212.10559) to the digit. ``dataclasses.replace`` changes one choice alone.

    Attributes:
        name: written into saved settings.
        damping: added to every norm and every denominator of a cosine. With 0, a zero vector has no direction and its
            cosine is undefined; the published 1e-20 makes it 0, which stays in the mean.
        ignores_rounding: whether a difference no larger than rounding is undefined as a vector (see `difference`), and
            tied as a rank.
        centres_maps: whether an attention map's mean over the tokens is subtracted before the cosine. The softmax
            ignores a constant added to all scores of a head (a key bias adds one), the cosine does not.
        ranks_logarithms: whether attention is ranked by the logarithms of its weights. They rank the same, but weights
            more than 745 below the largest score underflow to 0 and become tied.
        shares_ties: whether a tie across the k-th place counts with its expectation under random tie-breaking. The
            published programs keep whatever numpy's unstable argsort puts first.
        strict_means: whether one undefined query makes a layer's mean undefined.
        random_matches: whether the random null is isotropic and of the norm of the vector that it replaces. The
            published null is uniform on [0, 1) in every coordinate: any two such vectors have a cosine near 3/4.
        training_limit: how many queries of a recording the attention to training tokens reads; None for all.
    """

    name: str
    damping: float
    ignores_rounding: bool
    centres_maps: bool
    ranks_logarithms: bool
    shares_ties: bool
    strict_means: bool
    random_matches: bool
    training_limit: int | None

    DEFAULT: ClassVar[Convention]
    PUBLISHED: ClassVar[Convention]


Convention.DEFAULT = Convention(
    name="default",
    damping=0.0,
    ignores_rounding=True,
    centres_maps=True,
    ranks_logarithms=True,
    shares_ties=True,
    strict_means=False,
    random_matches=True,
    training_limit=None,
)
Convention.PUBLISHED = Convention(
    name="published",
    damping=1e-20,
    ignores_rounding=False,
    centres_maps=False,
    ranks_logarithms=False,
    shares_ties=False,
    strict_means=True,
    random_matches=False,
    training_limit=100,
)
