"""The context as weights: changes of a model's own matrices that do what the demonstrations do."""

from metaopt_lens.patches._compile import compile_context as compile_context
from metaopt_lens.patches._compile import generate_without_prompt as generate_without_prompt
from metaopt_lens.patches._shares import ContextShares as ContextShares
from metaopt_lens.patches._shares import LeftOut as LeftOut
from metaopt_lens.patches._shares import context_shares as context_shares
from metaopt_lens.patches._shares import leave_one_out as leave_one_out
from metaopt_lens.patches._static_patch import RIDGE as RIDGE
from metaopt_lens.patches._static_patch import StaticPatch as StaticPatch
from metaopt_lens.patches._static_patch import exact_patches as exact_patches
from metaopt_lens.patches._static_patch import fit_static as fit_static
from metaopt_lens.patches._static_patch import static_patch as static_patch
from metaopt_lens.patches._weight_patch import ExpertChanges as ExpertChanges
from metaopt_lens.patches._weight_patch import WeightPatch as WeightPatch

__all__ = [
    "ContextShares",
    "ExpertChanges",
    "LeftOut",
    "StaticPatch",
    "WeightPatch",
    "compile_context",
    "context_shares",
    "exact_patches",
    "fit_static",
    "generate_without_prompt",
    "leave_one_out",
    "static_patch",
]
