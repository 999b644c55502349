"""The only code that knows which TransformerLens class it holds."""

from metaopt_lens._types import HeadRef as HeadRef
from metaopt_lens.models._attention_call import AttentionCall as AttentionCall
from metaopt_lens.models._experts import ExpertsSite as ExpertsSite
from metaopt_lens.models._fingerprint import Fingerprint as Fingerprint
from metaopt_lens.models._fingerprint import check_made_for as check_made_for
from metaopt_lens.models._fingerprint import fingerprint_of as fingerprint_of
from metaopt_lens.models._fixed_norm import FixedNorm as FixedNorm
from metaopt_lens.models._gguf_cache import CacheRebuiltWarning as CacheRebuiltWarning
from metaopt_lens.models._gguf_source import weights_file as weights_file
from metaopt_lens.models._hooks import Hook as Hook
from metaopt_lens.models._hooks import HostFunction as HostFunction
from metaopt_lens.models._hooks import Late as Late
from metaopt_lens.models._hooks import as_host_hooks as as_host_hooks
from metaopt_lens.models._hooks import check_hook_names as check_hook_names
from metaopt_lens.models._hooks import from_host_hook as from_host_hook
from metaopt_lens.models._hooks import functions_at as functions_at
from metaopt_lens.models._info import ModelInfo as ModelInfo
from metaopt_lens.models._info import dtype_name as dtype_name
from metaopt_lens.models._intervention import Intervention as Intervention
from metaopt_lens.models._lens import LensModel as LensModel
from metaopt_lens.models._loading import load_model as load_model
from metaopt_lens.models._mlp import MlpSite as MlpSite
from metaopt_lens.models._mlp import OutputNorm as OutputNorm
from metaopt_lens.models._momentum_term import AddsMomentum as AddsMomentum
from metaopt_lens.models._momentum_term import MomentumTerm as MomentumTerm
from metaopt_lens.models._momentum_term import active_momentum as active_momentum
from metaopt_lens.models._momentum_term import join_etas as join_etas
from metaopt_lens.models._momentum_term import refuse_momentum as refuse_momentum
from metaopt_lens.models._output_head import OutputHead as OutputHead
from metaopt_lens.models._partial_passes import Readout as Readout
from metaopt_lens.models._partial_passes import Start as Start
from metaopt_lens.models._passes import PASS as PASS
from metaopt_lens.models._passes import HostPass as HostPass
from metaopt_lens.models._prefix import Prefix as Prefix
from metaopt_lens.models._wrapping import ProcessedWeightsWarning as ProcessedWeightsWarning
from metaopt_lens.models._wrapping import wrap as wrap

__all__ = [
    "CacheRebuiltWarning",
    "HeadRef",
    "Intervention",
    "LensModel",
    "ModelInfo",
    "ProcessedWeightsWarning",
    "load_model",
    "wrap",
]
