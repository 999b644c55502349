"""Runs of experiments and their stored results."""

from metaopt_lens.experiments._claim_page import ClaimBlock as ClaimBlock
from metaopt_lens.experiments._claim_page import claim_blocks as claim_blocks
from metaopt_lens.experiments._claim_page import claims_markdown as claims_markdown
from metaopt_lens.experiments._claim_page import markdown_table as markdown_table
from metaopt_lens.experiments._claim_sources import claims_of as claims_of
from metaopt_lens.experiments._claim_table import CLAIMS as CLAIMS
from metaopt_lens.experiments._claim_table import Claim as Claim
from metaopt_lens.experiments._claims import evaluate_claims as evaluate_claims
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
from metaopt_lens.experiments._sweep_result import runs_in as runs_in

__all__ = [
    "CLAIMS",
    "Claim",
    "ExperimentResult",
    "RunConfig",
    "SweepConfig",
    "SweepResult",
    "claims_of",
    "episode_prompts",
    "evaluate_claims",
    "load_run_model",
    "published_numbers",
    "run_experiment",
    "run_sweep",
]
