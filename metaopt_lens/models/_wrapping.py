"""The one place that asks what class a model has."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.models._bridge import BridgeHost
from metaopt_lens.models._hooked import HookedHost
from metaopt_lens.models._host import Host
from metaopt_lens.models._lens import LensModel, Tried
from metaopt_lens.models._native import ARCHITECTURE, NativeHost
from metaopt_lens.models._self_check import self_check

# Models that passed the check, with a fingerprint of the weights they passed it with, and what was tried with them.
# Adapters hold their model, so they must not be kept here: no wrapped model would ever be freed.
_Checked = tuple[tuple[Any, ...], weakref.ref[LensModel], Tried]
_CHECKED: weakref.WeakKeyDictionary[nn.Module, _Checked] = weakref.WeakKeyDictionary()


class ProcessedWeightsWarning(UserWarning):
    """The model's weights were folded: the split is that of the folded parametrisation, not of the original."""


def wrap(model: Any) -> LensModel:
    """View a TransformerLens model through the interface the whole library uses.

    The model itself is not modified. The first time (and again when its weights change) it is checked: every layer's
    attention pattern must come out of its queries and keys, and every head's output out of pattern and values.

    Args:
        model: a `HookedTransformer` (TransformerLens 3.x), a `TransformerBridge`, or an already wrapped model.

    Raises:
        UnsupportedModelError: another class, an architecture that cannot be split, or a failed self-check.
        NonFiniteError: the model's activations are NaN or infinite.
    """
    if isinstance(model, LensModel):
        return model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a TransformerLens model, got {type(model).__name__}: load one first, for example with "
            "TransformerBridge.boot_transformers('gpt2')."
        )
    adapter = _adapter_for(model)
    fingerprint = _fingerprint(model)
    known = _CHECKED.get(model)
    checked = known is not None and known[0] == fingerprint
    alive = known[1]() if known is not None and checked else None
    if alive is not None:
        return alive
    wrapped = LensModel(adapter(model), known[2] if known is not None and checked else None)
    if not checked:
        self_check(wrapped)
    if not checked and wrapped.info.is_processed:
        warnings.warn(
            f"{wrapped.info.name} has {' and '.join(wrapped.info.processing)}: the zero-shot and meta-gradient parts "
            "are those of the folded weights. Load with from_pretrained_no_processing (or without "
            "enable_compatibility_mode and process_weights) for the original parametrisation.",
            ProcessedWeightsWarning,
            stacklevel=2,
        )
    _CHECKED[model] = (fingerprint, weakref.ref(wrapped), wrapped.tried)
    return wrapped


def _adapter_for(model: nn.Module) -> Callable[[Any], Host]:
    import transformer_lens
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return NativeHost if model.cfg.architecture == ARCHITECTURE else BridgeHost
    try:
        hooked_class = transformer_lens.HookedTransformer
    except (ImportError, AttributeError):  # gone from 4.0
        hooked_class = None
    if hooked_class is not None and isinstance(model, hooked_class):
        return HookedHost
    name = type(model).__name__
    if type(model).__module__.startswith("transformers."):
        hint = "wrap it first: TransformerBridge.boot_transformers(name_or_dir, hf_model=model, tokenizer=tokenizer)"
    else:
        hint = "only HookedTransformer (3.x) and TransformerBridge are (decoder-only models)"
    raise UnsupportedModelError(f"a model of class {name} is not supported: {hint}.")


def _fingerprint(model: Any) -> tuple[Any, ...]:
    """Changes when weights are edited, moved or cast, or hooks are rerouted: the check must then be made again."""
    parameters = list(model.parameters())
    return (
        tuple((p.data_ptr(), p._version, p.dtype) for p in parameters),
        bool(model.cfg.use_attn_in),
        bool(model.cfg.use_split_qkv_input),
    )
