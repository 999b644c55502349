"""Runs of experiments and their stored results."""

from metaopt_lens.experiments._compiled_prompt import CompiledPrompt as CompiledPrompt
from metaopt_lens.experiments._compiled_prompt import compile_prompts as compile_prompts
from metaopt_lens.experiments._episode_prompts import episode_prompts as episode_prompts
from metaopt_lens.experiments._published import published_numbers as published_numbers
from metaopt_lens.experiments._run import run_experiment as run_experiment
from metaopt_lens.experiments._run_config import RunConfig as RunConfig
from metaopt_lens.experiments._run_inputs import find_run_task as find_run_task
from metaopt_lens.experiments._run_inputs import load_run_model as load_run_model
from metaopt_lens.experiments._run_result import ExperimentResult as ExperimentResult
from metaopt_lens.experiments._sweep import SweepConfig as SweepConfig
from metaopt_lens.experiments._sweep import run_sweep as run_sweep
from metaopt_lens.experiments._sweep_result import SweepResult as SweepResult

__all__ = [
    "ExperimentResult",
    "RunConfig",
    "SweepConfig",
    "SweepResult",
    "episode_prompts",
    "load_run_model",
    "published_numbers",
    "run_experiment",
    "run_sweep",
]
