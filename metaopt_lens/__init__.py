"""Is in-context learning a hidden gradient descent? Split every attention head and see.

What most analyses need is here; everything else is in the package's rooms, such as ``metaopt_lens.tasks``. Names and
rooms are loaded when first used, so that ``import metaopt_lens`` costs nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metaopt_lens import analysis as analysis
    from metaopt_lens import decomposition as decomposition
    from metaopt_lens import dual as dual
    from metaopt_lens import experiments as experiments
    from metaopt_lens import finetuning as finetuning
    from metaopt_lens import interventions as interventions
    from metaopt_lens import models as models
    from metaopt_lens import patches as patches
    from metaopt_lens import prompts as prompts
    from metaopt_lens import records as records
    from metaopt_lens import runs as runs
    from metaopt_lens import tasks as tasks
    from metaopt_lens import viz as viz
    from metaopt_lens._errors import MetaoptLensError as MetaoptLensError
    from metaopt_lens._types import HeadRef as HeadRef
    from metaopt_lens.analysis import Comparison as Comparison
    from metaopt_lens.analysis import compare as compare
    from metaopt_lens.decomposition import Decomposition as Decomposition
    from metaopt_lens.decomposition import DecompositionSet as DecompositionSet
    from metaopt_lens.decomposition import decompose as decompose
    from metaopt_lens.experiments import run_experiment as run_experiment
    from metaopt_lens.finetuning import WeightUpdate as WeightUpdate
    from metaopt_lens.finetuning import choose_learning_rate as choose_learning_rate
    from metaopt_lens.finetuning import finetune as finetune
    from metaopt_lens.interventions import KnockOut as KnockOut
    from metaopt_lens.interventions import MetaGradient as MetaGradient
    from metaopt_lens.interventions import MomentumAttention as MomentumAttention
    from metaopt_lens.interventions import head_effects as head_effects
    from metaopt_lens.interventions import intervene as intervene
    from metaopt_lens.interventions import meta_gradient as meta_gradient
    from metaopt_lens.models import load_model as load_model
    from metaopt_lens.models import tiny as tiny
    from metaopt_lens.models import wrap as wrap
    from metaopt_lens.models.tiny import load_tiny as load_tiny
    from metaopt_lens.patches import WeightPatch as WeightPatch
    from metaopt_lens.patches import compile_context as compile_context
    from metaopt_lens.prompts import ContextPrompt as ContextPrompt
    from metaopt_lens.prompts import Demo as Demo
    from metaopt_lens.prompts import ICLPrompt as ICLPrompt
    from metaopt_lens.prompts import Template as Template
    from metaopt_lens.prompts import load_prompts as load_prompts

_HOME = {
    "Comparison": "analysis",
    "ContextPrompt": "prompts",
    "Decomposition": "decomposition",
    "ICLPrompt": "prompts",
    "KnockOut": "interventions",
    "MetaGradient": "interventions",
    "MetaoptLensError": "_errors",
    "MomentumAttention": "interventions",
    "Template": "prompts",
    "WeightPatch": "patches",
    "WeightUpdate": "finetuning",
    "choose_learning_rate": "finetuning",
    "compare": "analysis",
    "compile_context": "patches",
    "decompose": "decomposition",
    "finetune": "finetuning",
    "head_effects": "interventions",
    "intervene": "interventions",
    "load_model": "models",
    "load_prompts": "prompts",
    "load_tiny": "models.tiny",
    "meta_gradient": "interventions",
    "run_experiment": "experiments",
    "wrap": "models",
}
# Namespaces, as `torch.nn` is one.
_ROOMS = {
    "analysis": "analysis",
    "decomposition": "decomposition",
    "dual": "dual",
    "experiments": "experiments",
    "finetuning": "finetuning",
    "interventions": "interventions",
    "models": "models",
    "patches": "patches",
    "prompts": "prompts",
    "records": "records",
    "runs": "runs",
    "tasks": "tasks",
    "tiny": "models.tiny",
    "training": "training",
    "viz": "viz",
}
# Rarely written out, and public in their rooms; here for code written for 0.1.
_ALSO = {"DecompositionSet": "decomposition", "Demo": "prompts", "HeadRef": "_types"}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> object:
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("metaopt-lens")
    if name in _ROOMS:
        return import_module(f"metaopt_lens.{_ROOMS[name]}")
    room = _HOME.get(name) or _ALSO.get(name)
    if room is None:
        raise AttributeError(f"module 'metaopt_lens' has no attribute {name!r}")
    value: object = getattr(import_module(f"metaopt_lens.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOME, *_ROOMS, "__version__"})
