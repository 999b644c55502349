"""Language models trained from scratch with and without momentum attention, and their comparison."""

from metaopt_lens.experiments.momentum._build import LanguageModel as LanguageModel
from metaopt_lens.experiments.momentum._build import build_model as build_model
from metaopt_lens.experiments.momentum._compare import MomentumComparison as MomentumComparison
from metaopt_lens.experiments.momentum._compare import compare_momentum as compare_momentum
from metaopt_lens.experiments.momentum._config import SHIPPED as SHIPPED
from metaopt_lens.experiments.momentum._config import TrainingConfig as TrainingConfig
from metaopt_lens.experiments.momentum._corpora import Corpus as Corpus
from metaopt_lens.experiments.momentum._corpora import load_corpus as load_corpus
from metaopt_lens.experiments.momentum._evaluate import Evaluation as Evaluation
from metaopt_lens.experiments.momentum._evaluate import evaluate as evaluate
from metaopt_lens.experiments.momentum._short import ShortConvolution as ShortConvolution
from metaopt_lens.experiments.momentum._train import TrainedModel as TrainedModel
from metaopt_lens.experiments.momentum._train import load_trained as load_trained
from metaopt_lens.experiments.momentum._train import train as train
