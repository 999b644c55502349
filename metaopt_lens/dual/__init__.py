"""The mathematics: pure tensor functions, no model, no hook, no tokenizer."""

from metaopt_lens.dual._finite import is_finite as is_finite
from metaopt_lens.dual._linear_form import LinearParts as LinearParts
from metaopt_lens.dual._linear_form import linear_memory as linear_memory
from metaopt_lens.dual._linear_form import linear_weights as linear_weights
from metaopt_lens.dual._linear_form import split_linear as split_linear
from metaopt_lens.dual._momentum_scan import check_eta as check_eta
from metaopt_lens.dual._momentum_scan import momentum_state as momentum_state
from metaopt_lens.dual._momentum_scan import momentum_values as momentum_values
from metaopt_lens.dual._momentum_scan import momentum_weights as momentum_weights
from metaopt_lens.dual._patch import rank_one_product as rank_one_product
from metaopt_lens.dual._patch import ridge_right_factors as ridge_right_factors
from metaopt_lens.dual._patch import ridge_scale as ridge_scale
from metaopt_lens.dual._patch import right_factor as right_factor
from metaopt_lens.dual._scores import ScoreRule as ScoreRule
from metaopt_lens.dual._scores import attend as attend
from metaopt_lens.dual._scores import attention_scores as attention_scores
from metaopt_lens.dual._scores import softmax_with_sink as softmax_with_sink
from metaopt_lens.dual._scores import visible_sources as visible_sources
from metaopt_lens.dual._softmax import SoftmaxParts as SoftmaxParts
from metaopt_lens.dual._softmax import merge_softmax as merge_softmax
from metaopt_lens.dual._softmax import split_softmax as split_softmax
from metaopt_lens.dual._weighted import at_least_float32 as at_least_float32
from metaopt_lens.dual._weighted import split_sources as split_sources
from metaopt_lens.dual._weighted import weighted_values as weighted_values

__all__ = [
    "LinearParts",
    "ScoreRule",
    "SoftmaxParts",
    "attend",
    "attention_scores",
    "linear_memory",
    "linear_weights",
    "merge_softmax",
    "momentum_state",
    "momentum_values",
    "momentum_weights",
    "rank_one_product",
    "ridge_right_factors",
    "ridge_scale",
    "right_factor",
    "softmax_with_sink",
    "split_linear",
    "split_softmax",
    "split_sources",
    "visible_sources",
    "weighted_values",
]
