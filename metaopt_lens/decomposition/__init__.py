"""capture -> dual forms -> a frozen result that can be asked for any head, demonstration or token."""

from metaopt_lens.decomposition._decompose import decompose as decompose
from metaopt_lens.decomposition._result import Decomposition as Decomposition
from metaopt_lens.decomposition._result import DecompositionSet as DecompositionSet
from metaopt_lens.decomposition._result import Effects as Effects
from metaopt_lens.decomposition._result import ResidualParts as ResidualParts
