"""The only code that knows which TransformerLens class it holds."""

from metaopt_lens.models.attention_call import AttentionCall as AttentionCall
from metaopt_lens.models.gguf_conversion import CacheRebuiltWarning as CacheRebuiltWarning
from metaopt_lens.models.hooks import Hook as Hook
from metaopt_lens.models.hooks import Late as Late
from metaopt_lens.models.info import ModelInfo as ModelInfo
from metaopt_lens.models.intervention import Intervention as Intervention
from metaopt_lens.models.lens import LensModel as LensModel
from metaopt_lens.models.loading import load_model as load_model
from metaopt_lens.models.mlp import MlpSite as MlpSite
from metaopt_lens.models.momentum_term import AddsMomentum as AddsMomentum
from metaopt_lens.models.momentum_term import MomentumTerm as MomentumTerm
from metaopt_lens.models.momentum_term import active_momentum as active_momentum
from metaopt_lens.models.momentum_term import join_etas as join_etas
from metaopt_lens.models.momentum_term import refuse_momentum as refuse_momentum
from metaopt_lens.models.output_head import OutputHead as OutputHead
from metaopt_lens.models.partial_passes import Readout as Readout
from metaopt_lens.models.partial_passes import Start as Start
from metaopt_lens.models.passes import PASS as PASS
from metaopt_lens.models.passes import HostPass as HostPass
from metaopt_lens.models.prefix import Prefix as Prefix
from metaopt_lens.models.wrapping import ProcessedWeightsWarning as ProcessedWeightsWarning
from metaopt_lens.models.wrapping import wrap as wrap
