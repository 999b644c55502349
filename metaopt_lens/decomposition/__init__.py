"""capture -> dual forms -> a frozen result that can be asked for any head, demonstration or token."""

from metaopt_lens.decomposition._decompose import decompose as decompose
from metaopt_lens.decomposition._decompose import prompt_groups as prompt_groups
from metaopt_lens.decomposition._frame import rank_heads as rank_heads
from metaopt_lens.decomposition._result import Decomposition as Decomposition
from metaopt_lens.decomposition._result import DecompositionSet as DecompositionSet
from metaopt_lens.decomposition._result import Effects as Effects
from metaopt_lens.decomposition._result import ResidualParts as ResidualParts
from metaopt_lens.decomposition._runs import SettingRuns as SettingRuns
from metaopt_lens.decomposition._runs import run_settings as run_settings
from metaopt_lens.decomposition._runs import without_demos as without_demos
