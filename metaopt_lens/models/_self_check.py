"""Trust, but test: before its first use a wrapped model must rebuild its own attention from what we read off it."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt_lens._errors import NonFiniteError, UnsupportedModelError
from metaopt_lens.dual import is_finite, softmax_with_sink, weighted_values
from metaopt_lens.models._attention_call import AttentionCall
from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._lens import LensModel

_N_TOKENS = 9
_LONGEST_WINDOW = 1024  # longer ones would cost too much to look behind
# Largest difference allowed, relative to the largest entry: rounding of the model's own arithmetic, with room to spare.
_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def self_check(model: LensModel) -> None:
    """Run a few tokens and rebuild, in every layer, the pattern from q and k and z from pattern and v.

    Where layers have sliding windows, the prompt reaches beyond all of them that are shorter than 1,024 tokens.

    Raises:
        UnsupportedModelError: a layer does something to q, k, v or z that its hooks do not show.
        NonFiniteError: activations are NaN or infinite; names the first such layer.
    """
    windows = [model.score_rule(layer).window for layer in range(model.info.n_layers)]
    longest = max((window for window in windows if window is not None and window < _LONGEST_WINDOW), default=0)
    n_tokens = min(longest + _N_TOKENS, model.info.n_ctx)
    tokens = (torch.arange(n_tokens) * 7919 + 5) % model.info.d_vocab
    tolerance = _TOLERANCE[model.info.dtype]
    seen: set[int] = set()

    def check(call: AttentionCall) -> None:
        seen.add(call.layer)
        for what, tensor in (("queries", call.q), ("keys", call.k), ("values", call.v), ("head outputs", call.z)):
            if not is_finite(tensor):
                raise NonFiniteError(f"{model.info.name}: {what} of layer {call.layer} hold NaN or infinity.")
        pattern, _ = softmax_with_sink(call.scores(), call.rule.sinks)
        _require(call.pattern, pattern, tolerance, model, call.layer, "attention pattern from q and k")
        _require(
            call.z, weighted_values(pattern, call.v), tolerance, model, call.layer, "head outputs from pattern and v"
        )

    hooks: list[Hook] = []
    for layer in range(model.info.n_layers):
        hooks += model.attention_hooks(layer, check)
    model.run(tokens[None], hooks=hooks, stop_after_attention=True)
    missing = set(range(model.info.n_layers)) - seen
    if missing:
        raise UnsupportedModelError(f"{model.info.name}: the hooks of layer {min(missing)} did not fire.")


def _require(actual: Tensor, rebuilt: Tensor, tolerance: float, model: LensModel, layer: int, what: str) -> None:
    error = (actual.to(rebuilt) - rebuilt).abs().max() / actual.abs().max().clamp_min(1e-30)
    if error > tolerance:
        raise UnsupportedModelError(
            f"{model.info.name} ({model.info.architecture}): rebuilding the {what} of layer {layer} misses the "
            f"model's own by {error:.1e} (relative; at most {tolerance:.0e} is rounding). Its attention does "
            "something TransformerLens does not expose, so its parts cannot be trusted."
        )
