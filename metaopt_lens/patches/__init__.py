"""The context as weights: changes of a model's own matrices that do what the demonstrations do."""

from metaopt_lens.patches._compile import compile_context as compile_context
from metaopt_lens.patches._compile import generate_without_prompt as generate_without_prompt
from metaopt_lens.patches._weight_patch import ExpertChanges as ExpertChanges
from metaopt_lens.patches._weight_patch import WeightPatch as WeightPatch

__all__ = ["ExpertChanges", "WeightPatch", "compile_context", "generate_without_prompt"]
