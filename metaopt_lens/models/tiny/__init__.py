"""The bundled model: a small transformer that learns in context, its words, prompts and accuracies."""

from ._evaluate import accuracy as accuracy
from ._evaluate import measure as measure
from ._evaluate import sample_episodes as sample_episodes
from ._load import load_folder as load_folder
from ._load import load_tiny as load_tiny
from ._sampling import Episode as Episode
from ._sampling import sample_binding as sample_binding
from ._sampling import sample_episode as sample_episode
from ._vocabulary import CATEGORIES as CATEGORIES
from ._vocabulary import CATEGORY_OF as CATEGORY_OF
from ._vocabulary import HELD_OUT_PAIRS as HELD_OUT_PAIRS
from ._vocabulary import LABELS as LABELS

__all__ = [
    "CATEGORIES",
    "CATEGORY_OF",
    "HELD_OUT_PAIRS",
    "LABELS",
    "Episode",
    "accuracy",
    "load_folder",
    "load_tiny",
    "measure",
    "sample_binding",
    "sample_episode",
    "sample_episodes",
]
