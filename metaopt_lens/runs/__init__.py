"""One prompt in one setting is a `Run`: the only thing that models give out, made by `record` and read by functions."""

from metaopt_lens.prompts import tokenize_all as tokenize_all
from metaopt_lens.prompts import tokenize_for as tokenize_for
from metaopt_lens.runs._apart import record_apart as record_apart
from metaopt_lens.runs._batching import batches as batches
from metaopt_lens.runs._batching import choose_batch_size as choose_batch_size
from metaopt_lens.runs._batching import map_batches as map_batches
from metaopt_lens.runs._destinations import Position as Position
from metaopt_lens.runs._destinations import destinations_of as destinations_of
from metaopt_lens.runs._destinations import prompt_groups as prompt_groups
from metaopt_lens.runs._forward import run_rows as run_rows
from metaopt_lens.runs._forward import run_shared_prefix as run_shared_prefix
from metaopt_lens.runs._guard import acting as acting
from metaopt_lens.runs._guard import acting_now as acting_now
from metaopt_lens.runs._guard import refuse_acting as refuse_acting
from metaopt_lens.runs._head_order import rank_heads as rank_heads
from metaopt_lens.runs._keep import Keep as Keep
from metaopt_lens.runs._keep import Row as Row
from metaopt_lens.runs._outputs import all_heads_output as all_heads_output
from metaopt_lens.runs._outputs import attention_output as attention_output
from metaopt_lens.runs._outputs import demo_scores as demo_scores
from metaopt_lens.runs._outputs import output_bias as output_bias
from metaopt_lens.runs._outputs import own_scores as own_scores
from metaopt_lens.runs._outputs import scaled_queries as scaled_queries
from metaopt_lens.runs._outputs import through_w_o as through_w_o
from metaopt_lens.runs._parts import delta_w_icl as delta_w_icl
from metaopt_lens.runs._parts import linear_parts as linear_parts
from metaopt_lens.runs._parts import memory_of as memory_of
from metaopt_lens.runs._parts import momentum_part as momentum_part
from metaopt_lens.runs._parts import part_of as part_of
from metaopt_lens.runs._parts import run_linear_weights as run_linear_weights
from metaopt_lens.runs._parts import softmax_parts as softmax_parts
from metaopt_lens.runs._parts import softmax_weights as softmax_weights
from metaopt_lens.runs._parts import w_zsl as w_zsl
from metaopt_lens.runs._predict import N_TOP as N_TOP
from metaopt_lens.runs._predict import LabelPrediction as LabelPrediction
from metaopt_lens.runs._predict import TopToken as TopToken
from metaopt_lens.runs._predict import VocabularyAnswer as VocabularyAnswer
from metaopt_lens.runs._predict import candidate_labels as candidate_labels
from metaopt_lens.runs._predict import keep_answers as keep_answers
from metaopt_lens.runs._predict import label_log_probs as label_log_probs
from metaopt_lens.runs._predict import predict_labels as predict_labels
from metaopt_lens.runs._predict import small_mass_note as small_mass_note
from metaopt_lens.runs._prompt_run import CHANGED as CHANGED
from metaopt_lens.runs._prompt_run import SETTINGS as SETTINGS
from metaopt_lens.runs._prompt_run import Run as Run
from metaopt_lens.runs._prompt_run import Runs as Runs
from metaopt_lens.runs._prompt_run import Setting as Setting
from metaopt_lens.runs._prompt_run import Stream as Stream
from metaopt_lens.runs._recording import Recorder as Recorder
from metaopt_lens.runs._recording import prepare as prepare
from metaopt_lens.runs._recording import queries_together as queries_together
from metaopt_lens.runs._recording import record as record
from metaopt_lens.runs._recording import record_batches as record_batches
from metaopt_lens.runs._runs_file import StoredRuns as StoredRuns
from metaopt_lens.runs._scoring import QueryReading as QueryReading
from metaopt_lens.runs._scoring import Scoring as Scoring
from metaopt_lens.runs._scoring import candidate_mass as candidate_mass
from metaopt_lens.runs._scoring import check_candidates as check_candidates
from metaopt_lens.runs._scoring import read_queries as read_queries
from metaopt_lens.runs._scoring import read_run as read_run
from metaopt_lens.runs._scoring import score_candidates as score_candidates
from metaopt_lens.runs._scoring import scored_tokens as scored_tokens
from metaopt_lens.runs._wanted import Wanted as Wanted

__all__ = [
    "Keep",
    "LabelPrediction",
    "Run",
    "Runs",
    "TopToken",
    "VocabularyAnswer",
    "predict_labels",
    "record",
]
