"""The only code that knows which TransformerLens class it holds."""

from metaopt_lens.models._abstract import AttentionCall as AttentionCall
from metaopt_lens.models._abstract import AttentionModel as AttentionModel
from metaopt_lens.models._abstract import Intervention as Intervention
from metaopt_lens.models._abstract import ModelInfo as ModelInfo
from metaopt_lens.models._abstract import Prefix as Prefix
from metaopt_lens.models._active import MomentumTerm as MomentumTerm
from metaopt_lens.models._active import active_momentum as active_momentum
from metaopt_lens.models._active import announced_momentum as announced_momentum
from metaopt_lens.models._active import join_etas as join_etas
from metaopt_lens.models._active import refuse_momentum as refuse_momentum
from metaopt_lens.models._gguf import CacheRebuiltWarning as CacheRebuiltWarning
from metaopt_lens.models._hooks import Hook as Hook
from metaopt_lens.models._hooks import Late as Late
from metaopt_lens.models._load import load_model as load_model
from metaopt_lens.models._mlp import MlpSite as MlpSite
from metaopt_lens.models._passes import PASS as PASS
from metaopt_lens.models._passes import HostPass as HostPass
from metaopt_lens.models._passes import PlacedCall as PlacedCall
from metaopt_lens.models._wrap import ProcessedWeightsWarning as ProcessedWeightsWarning
from metaopt_lens.models._wrap import wrap as wrap
