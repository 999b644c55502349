"""Explicit finetuning on a frozen base: updates dW_K, dW_V, ... as values made of hooks (docs/theory.md, section 3)."""

from metaopt_lens.finetuning._examples import TrainingExample as TrainingExample
from metaopt_lens.finetuning._examples import demonstration_ids as demonstration_ids
from metaopt_lens.finetuning._examples import training_examples as training_examples
from metaopt_lens.finetuning._finetune import finetune as finetune
from metaopt_lens.finetuning._finetune import require_raw_weights as require_raw_weights
from metaopt_lens.finetuning._learning_rate import LearningRateChoice as LearningRateChoice
from metaopt_lens.finetuning._learning_rate import choose_learning_rate as choose_learning_rate
from metaopt_lens.finetuning._settings import MLP as MLP
from metaopt_lens.finetuning._settings import FinetuneSettings as FinetuneSettings
from metaopt_lens.finetuning._update import StepFactors as StepFactors
from metaopt_lens.finetuning._update import WeightUpdate as WeightUpdate
from metaopt_lens.finetuning._updated_memory import UpdatedMemory as UpdatedMemory
from metaopt_lens.finetuning._updated_memory import delta_w_ft as delta_w_ft
from metaopt_lens.finetuning._updated_memory import updated_memory as updated_memory

__all__ = [
    "FinetuneSettings",
    "LearningRateChoice",
    "StepFactors",
    "WeightUpdate",
    "choose_learning_rate",
    "finetune",
]
