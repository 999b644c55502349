"""Run a wrapped model and keep what was asked for, nothing else."""

from metaopt_lens.extraction._batching import choose_batch_size as choose_batch_size
from metaopt_lens.extraction._batching import map_batches as map_batches
from metaopt_lens.extraction._capture import QueryCapture as QueryCapture
from metaopt_lens.extraction._capture import capture_queries as capture_queries
from metaopt_lens.extraction._capture import run_shared_prefix as run_shared_prefix
from metaopt_lens.extraction._guard import acting as acting
from metaopt_lens.extraction._guard import refuse_acting as refuse_acting
from metaopt_lens.extraction._predict import LabelPrediction as LabelPrediction
from metaopt_lens.extraction._predict import candidate_labels as candidate_labels
from metaopt_lens.extraction._predict import label_log_probs as label_log_probs
from metaopt_lens.extraction._predict import predict_labels as predict_labels
from metaopt_lens.extraction._scoring import Scoring as Scoring
from metaopt_lens.extraction._scoring import check_candidates as check_candidates
from metaopt_lens.extraction._scoring import score_candidates as score_candidates
from metaopt_lens.extraction._tokens import tokenize_for as tokenize_for
