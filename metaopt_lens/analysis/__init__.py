"""Similarity, recall, rank statistics, nulls and confidence intervals: pure functions of tensors."""

from metaopt_lens.analysis._algebra import DemonstrationAlgebra as DemonstrationAlgebra
from metaopt_lens.analysis._algebra import demonstration_algebra as demonstration_algebra
from metaopt_lens.analysis._ceiling import Ceiling as Ceiling
from metaopt_lens.analysis._ceiling import ceiling as ceiling
from metaopt_lens.analysis._compare import compare as compare
from metaopt_lens.analysis._compare_options import Controls as Controls
from metaopt_lens.analysis._compare_options import Finetuning as Finetuning
from metaopt_lens.analysis._compare_options import Measures as Measures
from metaopt_lens.analysis._comparison import Comparison as Comparison
from metaopt_lens.analysis._contribution_intervals import contribution_intervals as contribution_intervals
from metaopt_lens.analysis._controls import flip_labels as flip_labels
from metaopt_lens.analysis._controls import randomized_copy as randomized_copy
from metaopt_lens.analysis._controls import shuffle_labels as shuffle_labels
from metaopt_lens.analysis._controls import unrelated_update as unrelated_update
from metaopt_lens.analysis._controls import uphill_update as uphill_update
from metaopt_lens.analysis._convention import Convention as Convention
from metaopt_lens.analysis._following import LabelFollowing as LabelFollowing
from metaopt_lens.analysis._following import follow_labels as follow_labels
from metaopt_lens.analysis._following import join_following as join_following
from metaopt_lens.analysis._function_vector_heads import FunctionVectorHeads as FunctionVectorHeads
from metaopt_lens.analysis._function_vector_heads import function_vector_heads as function_vector_heads
from metaopt_lens.analysis._further import Further as Further
from metaopt_lens.analysis._further import join_further as join_further
from metaopt_lens.analysis._head_profile import HeadProfile as HeadProfile
from metaopt_lens.analysis._head_profile import head_profile as head_profile
from metaopt_lens.analysis._head_profile import join_profiles as join_profiles
from metaopt_lens.analysis._head_profile import spearman_rho as spearman_rho
from metaopt_lens.analysis._head_scores import attention_scores_of_heads as attention_scores_of_heads
from metaopt_lens.analysis._head_scores import function_vector_scores as function_vector_scores
from metaopt_lens.analysis._head_scores import induction_score as induction_score
from metaopt_lens.analysis._head_scores import previous_token_score as previous_token_score
from metaopt_lens.analysis._held_out import Explained as Explained
from metaopt_lens.analysis._interval import MIN_SETS_TO_TEST as MIN_SETS_TO_TEST
from metaopt_lens.analysis._interval import Interval as Interval
from metaopt_lens.analysis._interval import mean_interval as mean_interval
from metaopt_lens.analysis._interval import scope as scope
from metaopt_lens.analysis._interval import span_text as span_text
from metaopt_lens.analysis._joining import join_measured as join_measured
from metaopt_lens.analysis._label_answers import Answers as Answers
from metaopt_lens.analysis._label_answers import join_answers as join_answers
from metaopt_lens.analysis._ladder import OptimiserLadder as OptimiserLadder
from metaopt_lens.analysis._ladder import optimiser_ladder as optimiser_ladder
from metaopt_lens.analysis._matrices import Factors as Factors
from metaopt_lens.analysis._matrices import PrincipalAngles as PrincipalAngles
from metaopt_lens.analysis._matrices import effective_rank as effective_rank
from metaopt_lens.analysis._matrices import frobenius_cosine as frobenius_cosine
from metaopt_lens.analysis._matrices import principal_angles as principal_angles
from metaopt_lens.analysis._matrices import random_factors as random_factors
from metaopt_lens.analysis._matrices import random_subspace_angles as random_subspace_angles
from metaopt_lens.analysis._matrices import singular_values as singular_values
from metaopt_lens.analysis._measured import Measured as Measured
from metaopt_lens.analysis._measuring import Context as Context
from metaopt_lens.analysis._multiple import adjust_p_values as adjust_p_values
from metaopt_lens.analysis._null_names import ANALYTIC as ANALYTIC
from metaopt_lens.analysis._null_names import FLIPPED_LABELS as FLIPPED_LABELS
from metaopt_lens.analysis._null_names import NULLS as NULLS
from metaopt_lens.analysis._null_names import OTHER_QUERY as OTHER_QUERY
from metaopt_lens.analysis._null_names import SHUFFLED_LABELS as SHUFFLED_LABELS
from metaopt_lens.analysis._null_names import UNRELATED_TEXT as UNRELATED_TEXT
from metaopt_lens.analysis._null_names import null_of as null_of
from metaopt_lens.analysis._nulls import NullDraws as NullDraws
from metaopt_lens.analysis._nulls import derangement as derangement
from metaopt_lens.analysis._nulls import other_query_null as other_query_null
from metaopt_lens.analysis._nulls import random_like as random_like
from metaopt_lens.analysis._nulls import random_null as random_null
from metaopt_lens.analysis._order import OrderSpread as OrderSpread
from metaopt_lens.analysis._order import order_spread as order_spread
from metaopt_lens.analysis._output_parts import PARTS as PARTS
from metaopt_lens.analysis._pairs import is_part as is_part
from metaopt_lens.analysis._pairs import part_name as part_name
from metaopt_lens.analysis._patch_against_finetuning import PatchAgainstFinetuning as PatchAgainstFinetuning
from metaopt_lens.analysis._patch_against_finetuning import change_cosines as change_cosines
from metaopt_lens.analysis._patch_against_finetuning import patch_against_finetuning as patch_against_finetuning
from metaopt_lens.analysis._query_statistic import QueryStatistic as QueryStatistic
from metaopt_lens.analysis._rank import kendall_tau as kendall_tau
from metaopt_lens.analysis._recall import Rec2FTP as Rec2FTP
from metaopt_lens.analysis._recall import TopKRecall as TopKRecall
from metaopt_lens.analysis._recall import exact_interval as exact_interval
from metaopt_lens.analysis._recall import rec2ftp as rec2ftp
from metaopt_lens.analysis._recall import topk_recall as topk_recall
from metaopt_lens.analysis._relabel import LabelWords as LabelWords
from metaopt_lens.analysis._relabel import label_map as label_map
from metaopt_lens.analysis._relabel import relabelled as relabelled
from metaopt_lens.analysis._similarity import SimAM as SimAM
from metaopt_lens.analysis._similarity import SimAOU as SimAOU
from metaopt_lens.analysis._similarity import am_maps as am_maps
from metaopt_lens.analysis._similarity import aou_updates as aou_updates
from metaopt_lens.analysis._similarity import cosine as cosine
from metaopt_lens.analysis._similarity import difference as difference
from metaopt_lens.analysis._similarity import sim_am as sim_am
from metaopt_lens.analysis._similarity import sim_aou as sim_aou
from metaopt_lens.analysis._similarity import sim_aou_null as sim_aou_null
from metaopt_lens.analysis._similarity import unit as unit
from metaopt_lens.analysis._static_curve import StaticCurve as StaticCurve
from metaopt_lens.analysis._static_curve import static_curve as static_curve
from metaopt_lens.analysis._static_curve import static_ranks as static_ranks
from metaopt_lens.analysis._static_sets import PatchesAgainstFinetuning as PatchesAgainstFinetuning
from metaopt_lens.analysis._static_sets import StaticAnswers as StaticAnswers
from metaopt_lens.analysis._static_sets import StaticCurves as StaticCurves
from metaopt_lens.analysis._static_sets import patches_against_finetuning as patches_against_finetuning
from metaopt_lens.analysis._static_sets import static_table as static_table
from metaopt_lens.analysis._statistic import Statistic as Statistic
from metaopt_lens.analysis._statistics import STATISTICS as STATISTICS
from metaopt_lens.analysis._statistics import statistic as statistic
from metaopt_lens.analysis._training_attention import TrainingAttention as TrainingAttention
from metaopt_lens.analysis._training_attention import context_columns as context_columns
from metaopt_lens.analysis._training_attention import demonstration_queries as demonstration_queries
from metaopt_lens.analysis._training_attention import finetuning_scores as finetuning_scores
from metaopt_lens.analysis._training_attention import training_attention as training_attention
from metaopt_lens.analysis._training_attention import usable_factors as usable_factors
from metaopt_lens.analysis._update_words import finetuning_words as finetuning_words
from metaopt_lens.analysis._update_words import value_update_words as value_update_words
from metaopt_lens.analysis._verdict import Finding as Finding
from metaopt_lens.analysis._verdict import findings as findings
from metaopt_lens.analysis._verdict import headline as headline
from metaopt_lens.analysis._verdict import not_beyond as not_beyond
from metaopt_lens.analysis._verdict import not_working as not_working
from metaopt_lens.analysis._verdict import outcome as outcome

__all__ = [
    "FLIPPED_LABELS",
    "NULLS",
    "OTHER_QUERY",
    "SHUFFLED_LABELS",
    "STATISTICS",
    "UNRELATED_TEXT",
    "Ceiling",
    "Comparison",
    "Controls",
    "Convention",
    "DemonstrationAlgebra",
    "Explained",
    "Factors",
    "Finding",
    "Finetuning",
    "FunctionVectorHeads",
    "Further",
    "HeadProfile",
    "Interval",
    "LabelFollowing",
    "Measures",
    "OptimiserLadder",
    "OrderSpread",
    "PrincipalAngles",
    "QueryStatistic",
    "Rec2FTP",
    "SimAM",
    "SimAOU",
    "Statistic",
    "TopKRecall",
    "adjust_p_values",
    "ceiling",
    "compare",
    "contribution_intervals",
    "cosine",
    "demonstration_algebra",
    "difference",
    "effective_rank",
    "exact_interval",
    "findings",
    "finetuning_words",
    "flip_labels",
    "follow_labels",
    "frobenius_cosine",
    "function_vector_heads",
    "head_profile",
    "headline",
    "kendall_tau",
    "mean_interval",
    "optimiser_ladder",
    "order_spread",
    "principal_angles",
    "randomized_copy",
    "rec2ftp",
    "shuffle_labels",
    "sim_am",
    "sim_aou",
    "sim_aou_null",
    "topk_recall",
    "unrelated_update",
    "uphill_update",
]
