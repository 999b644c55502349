"""Changes to a model that are nothing but hooks, and the context that composes them."""

from metaopt_lens.interventions._apply import AppliedMetaGradient as AppliedMetaGradient
from metaopt_lens.interventions._attribution import head_effects as head_effects
from metaopt_lens.interventions._change import Change as Change
from metaopt_lens.interventions._change import Memory as Memory
from metaopt_lens.interventions._change import StagedIntervention as StagedIntervention
from metaopt_lens.interventions._change import Visibility as Visibility
from metaopt_lens.interventions._demo_tokens import DemoTokens as DemoTokens
from metaopt_lens.interventions._function_vector import AppliedFunctionVector as AppliedFunctionVector
from metaopt_lens.interventions._function_vector import FunctionVector as FunctionVector
from metaopt_lens.interventions._function_vector import function_vector as function_vector
from metaopt_lens.interventions._function_vector import word_pair_prompts as word_pair_prompts
from metaopt_lens.interventions._head_effects import HeadEffects as HeadEffects
from metaopt_lens.interventions._head_effects import ICLHeads as ICLHeads
from metaopt_lens.interventions._head_effects import rank_by_effect as rank_by_effect
from metaopt_lens.interventions._intervene import fwd_hooks as fwd_hooks
from metaopt_lens.interventions._intervene import intervene as intervene
from metaopt_lens.interventions._knock_out import KnockOut as KnockOut
from metaopt_lens.interventions._logit_effects import LogitEffects as LogitEffects
from metaopt_lens.interventions._logit_effects import LogitRead as LogitRead
from metaopt_lens.interventions._logit_effects import logit_effects as logit_effects
from metaopt_lens.interventions._meta_gradient import MetaGradient as MetaGradient
from metaopt_lens.interventions._meta_gradient import meta_gradient as meta_gradient
from metaopt_lens.interventions._momentum import MomentumAttention as MomentumAttention
from metaopt_lens.interventions._pipeline import Staged as Staged
from metaopt_lens.interventions._pipeline import pipeline as pipeline
from metaopt_lens.interventions._recovery import Recovery as Recovery
from metaopt_lens.interventions._recovery import recovery as recovery
from metaopt_lens.interventions._recovery import split_queries as split_queries
from metaopt_lens.interventions._sight import Sight as Sight
from metaopt_lens.interventions._sight import Sources as Sources

__all__ = [
    "AppliedFunctionVector",
    "AppliedMetaGradient",
    "Change",
    "FunctionVector",
    "HeadEffects",
    "ICLHeads",
    "KnockOut",
    "Memory",
    "MetaGradient",
    "MomentumAttention",
    "Recovery",
    "Sight",
    "Sources",
    "StagedIntervention",
    "Visibility",
    "function_vector",
    "fwd_hooks",
    "head_effects",
    "intervene",
    "meta_gradient",
    "word_pair_prompts",
]
