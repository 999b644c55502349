"""Run a wrapped model and keep what was asked for, nothing else."""

from metaopt_lens.extraction._capture import QueryCapture as QueryCapture
from metaopt_lens.extraction._capture import capture_queries as capture_queries
from metaopt_lens.extraction._capture import run_shared_prefix as run_shared_prefix
