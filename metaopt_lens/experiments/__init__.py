"""Runs and their stored results, and the published implementation's record files."""

from metaopt_lens.experiments._analysis_result import LayerMetric as LayerMetric
from metaopt_lens.experiments._analysis_result import RecordAnalysis as RecordAnalysis
from metaopt_lens.experiments._analysis_result import RecordShapes as RecordShapes
from metaopt_lens.experiments._analyze import analyze_records as analyze_records
from metaopt_lens.experiments._prompt_comparison import PromptComparison as PromptComparison
from metaopt_lens.experiments._prompt_comparison import compare_prompts as compare_prompts
from metaopt_lens.experiments._prompt_comparison import episode_prompts as episode_prompts
from metaopt_lens.experiments._published import published_numbers as published_numbers
from metaopt_lens.experiments._record_run import write_run_records as write_run_records
from metaopt_lens.experiments._records import DemoRecord as DemoRecord
from metaopt_lens.experiments._records import QueryRecord as QueryRecord
from metaopt_lens.experiments._records import read_demos as read_demos
from metaopt_lens.experiments._records import read_queries as read_queries
from metaopt_lens.experiments._records import write_records as write_records
from metaopt_lens.experiments._run import find_run_task as find_run_task
from metaopt_lens.experiments._run import load_run_model as load_run_model
from metaopt_lens.experiments._run import run_experiment as run_experiment
from metaopt_lens.experiments._run_config import RunConfig as RunConfig
from metaopt_lens.experiments._run_result import ExperimentResult as ExperimentResult
from metaopt_lens.experiments._sweep import SweepConfig as SweepConfig
from metaopt_lens.experiments._sweep import SweepResult as SweepResult
from metaopt_lens.experiments._sweep import run_sweep as run_sweep
