"""Language models trained from scratch with and without momentum attention, and their comparison.

Nothing but the command line imports this room. Names are loaded when first used, so that its commands show their help
at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaopt_lens.training._corpora import Corpus as Corpus
    from metaopt_lens.training._corpora import load_corpus as load_corpus
    from metaopt_lens.training._evaluation import Evaluation as Evaluation
    from metaopt_lens.training._evaluation import evaluate as evaluate
    from metaopt_lens.training._language_model import LanguageModel as LanguageModel
    from metaopt_lens.training._language_model import build_model as build_model
    from metaopt_lens.training._momentum_comparison import MomentumComparison as MomentumComparison
    from metaopt_lens.training._momentum_page import momentum_figure as momentum_figure
    from metaopt_lens.training._momentum_page import write_momentum_page as write_momentum_page
    from metaopt_lens.training._paired_training import compare_momentum as compare_momentum
    from metaopt_lens.training._short_convolution import ShortConvolution as ShortConvolution
    from metaopt_lens.training._trained_model import TrainedModel as TrainedModel
    from metaopt_lens.training._training_config import SHIPPED as SHIPPED
    from metaopt_lens.training._training_config import TrainingConfig as TrainingConfig
    from metaopt_lens.training._training_run import load_trained as load_trained
    from metaopt_lens.training._training_run import train as train

_HOME = {
    "SHIPPED": "_training_config",
    "Corpus": "_corpora",
    "Evaluation": "_evaluation",
    "LanguageModel": "_language_model",
    "MomentumComparison": "_momentum_comparison",
    "ShortConvolution": "_short_convolution",
    "TrainedModel": "_trained_model",
    "TrainingConfig": "_training_config",
    "build_model": "_language_model",
    "compare_momentum": "_paired_training",
    "evaluate": "_evaluation",
    "load_corpus": "_corpora",
    "load_trained": "_training_run",
    "momentum_figure": "_momentum_page",
    "train": "_training_run",
    "write_momentum_page": "_momentum_page",
}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
