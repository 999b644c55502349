"""The context as weights: changes of a model's own matrices that do what the demonstrations do."""

from metaopt_lens.patches._compile import compile_context as compile_context
from metaopt_lens.patches._compile import generate_without_prompt as generate_without_prompt
from metaopt_lens.patches._shares import ContextShares as ContextShares
from metaopt_lens.patches._shares import LeftOut as LeftOut
from metaopt_lens.patches._shares import context_shares as context_shares
from metaopt_lens.patches._shares import leave_one_out as leave_one_out
from metaopt_lens.patches._weight_patch import ExpertChanges as ExpertChanges
from metaopt_lens.patches._weight_patch import WeightPatch as WeightPatch

__all__ = [
    "ContextShares",
    "ExpertChanges",
    "LeftOut",
    "WeightPatch",
    "compile_context",
    "context_shares",
    "generate_without_prompt",
    "leave_one_out",
]
