"""The split of every head on a prompt, composed of the prompt's runs."""

from metaopt_lens.decomposition._answer_tokens import Answer as Answer
from metaopt_lens.decomposition._contribution_set import LogitContributionSet as LogitContributionSet
from metaopt_lens.decomposition._decompose import decompose as decompose
from metaopt_lens.decomposition._decomposition import Decomposition as Decomposition
from metaopt_lens.decomposition._decomposition_set import DecompositionSet as DecompositionSet
from metaopt_lens.decomposition._direct_logits import at_one_destination as at_one_destination
from metaopt_lens.decomposition._effects import Effects as Effects
from metaopt_lens.decomposition._effects import ResidualParts as ResidualParts
from metaopt_lens.decomposition._effects import effects_of as effects_of
from metaopt_lens.decomposition._lens_parts import written as written
from metaopt_lens.decomposition._lens_words import LensMaps as LensMaps
from metaopt_lens.decomposition._lens_words import LensWords as LensWords
from metaopt_lens.decomposition._lens_words import UpdateDirection as UpdateDirection
from metaopt_lens.decomposition._lens_words import read_words as read_words
from metaopt_lens.decomposition._logit_contributions import LogitContributions as LogitContributions
from metaopt_lens.decomposition._reading import read_along as read_along

__all__ = [
    "Decomposition",
    "DecompositionSet",
    "Effects",
    "LensWords",
    "LogitContributionSet",
    "LogitContributions",
    "ResidualParts",
    "UpdateDirection",
    "decompose",
]
