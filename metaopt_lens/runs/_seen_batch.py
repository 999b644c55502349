"""What is seen of a batch of rows while a pass runs: it becomes their `Run`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt_lens._errors import NonFiniteError
from metaopt_lens.dual import ScoreRule, at_least_float32, is_finite, momentum_values, softmax_with_sink
from metaopt_lens.models import AttentionCall, Hook, LensModel, Prefix, Readout, active_momentum
from metaopt_lens.runs._guard import excess_over_parts, require_parts
from metaopt_lens.runs._keep import Keep, Row
from metaopt_lens.runs._prompt_run import MATCHED, Run, Stream

_STREAM = ("start", "end", "mlp")


class SeenBatch:
    """What is seen of the rows while a pass runs: for every row, quantities by name and layer."""

    def __init__(self, model: LensModel, prefix: Prefix | None, rows: Sequence[Row], keep: Keep) -> None:
        self._model, self._prefix, self._rows, self._keep = model, prefix, rows, keep
        self._offset = 0 if prefix is None else prefix.n_tokens
        self._n_seeing = sum(row.setting not in MATCHED for row in rows)
        self._eta = active_momentum(model)
        self._rules: list[ScoreRule] = []
        self._seen: list[dict[str, dict[int, Tensor]]] = [{} for _ in rows]
        self._excess: list[list[Tensor]] = [[] for _ in rows]  # per layer: how far heads are from their parts

    @property
    def ids(self) -> Int[Tensor, "batch pos"]:
        """Token ids of the queries, padded on the right."""
        return pad_sequence([torch.tensor(row.tokens.ids[self._offset :]) for row in self._rows], batch_first=True)

    @property
    def readout(self) -> Readout:
        """The destinations, whose logits are read."""
        at = [self._at(row, torch.device("cpu")) for row in range(len(self._rows))]
        return Readout(pad_sequence(at, batch_first=True))

    def hooks(self, layer: int) -> list[Hook]:
        """Hooks that keep what a layer shows."""
        model, keep = self._model, self._keep
        hooks = model.attention_hooks(layer, self._attention, prefix=self._prefix)
        if keep.raw_q:
            hooks.append((model.hook_name("q", layer), self._keeper("raw_q", layer)))
        if keep.attention_input:
            hooks.append(model.attention_input_hook(layer, self._keeper("attention_input", layer)))
        if keep.residual:
            hooks.append((model.residual_hook("pre", layer), self._keeper("residual", layer)))
        if keep.stream:
            hooks.append((model.hook_name("mlp_out", layer), self._keeper("mlp", layer)))
            if layer == 0:
                hooks.append((model.residual_hook("pre", layer), self._keeper("start", layer)))
        if layer == model.info.n_layers - 1:
            end = model.residual_hook("post", layer)
            hooks += [(end, self._keeper("residual", layer + 1))] if keep.residual else []
            hooks += [(end, self._keeper("end", layer))] if keep.stream else []
        return hooks

    def run(self, row: int, logits: Tensor | None) -> Run:
        """The finished run of one row."""
        item, found = self._rows[row], self._seen[row]
        for layer in range(self._model.info.n_layers):
            named = {"queries": "q", "keys": "own_k", "values": "own_v", "outputs": "z"}
            require_finite(self._model, layer, **{what: found[key][layer] for what, key in named.items()})
            if self._excess[row]:
                require_parts(self._model, layer, self._excess[row][layer])
        stream = self._stream(found) if self._keep.stream else None
        tensors: dict[str, Any] = {
            name: _stack([layers[i] for i in sorted(layers)], 0 if name.startswith("own") else 1)
            for name, layers in found.items()
            if name not in _STREAM
        }
        return Run(
            setting=item.setting,
            model=self._model.info,
            tokens=item.tokens,
            destinations=item.destinations,
            prefix=self._prefix,
            rules=tuple(self._rules),
            eta=self._eta if self._eta is None or tensors["z"].requires_grad else self._eta.detach(),
            stream=stream,
            **tensors,
            **self._asked(row, logits),
        )

    def _stream(self, found: Mapping[str, Mapping[int, Tensor]]) -> Stream:
        (start,), (end,), mlp = found["start"].values(), found["end"].values(), found.get("mlp", {})
        none = torch.zeros_like(end)  # attention-only blocks
        return Stream(start, end, _stack([mlp.get(i, none) for i in range(self._model.info.n_layers)], 1))

    def _attention(self, call: AttentionCall) -> Tensor | None:
        """Keep a layer's attention; hide D from the position-matched rows, whose z is replaced."""
        self._rules.append(call.rule)
        n = self._n_seeing
        (pattern, sink), z = _pattern(call, slice(n)), call.z
        if n < len(self._rows):
            hidden = self._without_demos(call)
            z = torch.cat([z[:n], hidden.z])
        for row, item in enumerate(self._rows):
            n_src = item.tokens.n_tokens
            at, own = self._at(row, z.device), slice(self._offset, n_src)
            weights, to_sink = (pattern[row], sink[row]) if row < n else (hidden.pattern[row - n], hidden.sink[row - n])
            if row < n:
                self._excess[row].append(self._off_its_parts(call, row, at, weights[:, at, :n_src]))
            # Copies (indexing with `at` makes one), so that nothing keeps the whole batch's tensors alive.
            self._seen_at(row, "q", call.layer, call.q[row, at])
            self._seen_at(row, "z", call.layer, z[row, at])
            self._seen_at(row, "pattern", call.layer, weights[:, at, :n_src].transpose(0, 1))
            self._seen_at(row, "sink", call.layer, to_sink[:, at].T)
            self._seen_at(row, "own_k", call.layer, call.k[row, own].clone())
            self._seen_at(row, "own_v", call.layer, call.v[row, own].clone())
        return None if n == len(self._rows) else z

    def _off_its_parts(
        self, call: AttentionCall, row: int, at: Int[Tensor, " dst"], pattern: Float[Tensor, "head dst src"]
    ) -> Float[Tensor, " head"]:
        """How far z is from its parts. Position-matched rows are made of scores: then the pattern is checked too."""
        eta = None if self._eta is None else self._eta[call.layer]
        matched = self._n_seeing < len(self._rows)
        return excess_over_parts(call, row, at, pattern, eta, with_pattern=matched)

    def _without_demos(self, call: AttentionCall) -> _Hidden:
        """Attention of the position-matched rows."""
        rows = slice(self._n_seeing, None)
        hidden = call.inside(self._rows[-1].tokens.demonstrations)
        z, pattern, sink = call.rows(rows).attend(hidden)
        if self._eta is not None:  # D still takes its places in the moving average
            v = call.v[rows].masked_fill(hidden[:, None, None], 0.0)
            z = z + momentum_values(v, self._eta[call.layer])[:, call.offset :].to(z.dtype)
        return _Hidden(z=z, pattern=pattern, sink=sink)

    def _asked(self, row: int, logits: Tensor | None) -> dict[str, Any]:
        if logits is None or not self._keep.logits:
            return {}
        found = at_least_float32(logits[row, : len(self._rows[row].destinations)])  # dst d_vocab
        asked = found[:, torch.tensor(self._keep.logits, device=found.device)]
        top = found.topk(min(self._keep.n_top, found.shape[-1]))
        return {
            "asked": self._keep.logits,
            "logits": asked,
            "log_normaliser": found.logsumexp(-1),
            "ranks": 1 + torch.stack([(found > column[:, None]).sum(-1) for column in asked.T], dim=-1),
            "top_tokens": top.indices,
            "top_logits": top.values,
        }

    def _at(self, row: int, device: torch.device) -> Int[Tensor, " dst"]:
        """Destinations of a row, counted from its first new token."""
        return torch.tensor([d - self._offset for d in self._rows[row].destinations], device=device)

    def _keeper(self, name: str, layer: int) -> Callable[[Tensor], None]:
        def use(tensor: Tensor) -> None:
            for row in range(len(self._rows)):
                self._seen_at(row, name, layer, tensor[row, self._at(row, tensor.device)])

        return use

    def _seen_at(self, row: int, name: str, layer: int, tensor: Tensor) -> None:
        self._seen[row].setdefault(name, {})[layer] = tensor


@dataclass(frozen=True)
class _Hidden:
    """Attention of some rows of a batch with D hidden from them."""

    z: Float[Tensor, "rows dst head d_head"]
    pattern: Float[Tensor, "rows head dst src"]
    sink: Float[Tensor, "rows head dst"]


def _pattern(call: AttentionCall, rows: slice) -> tuple[Tensor, Tensor]:
    """The pattern of some rows, and what goes to the sink."""
    pattern = call.pattern[rows]
    # float16 has no room for small probabilities (below 6e-5 it loses digits, below 6e-8 everything).
    too_coarse = pattern.dtype == torch.float16
    if not too_coarse and call.rule.sinks is None:
        return pattern, torch.zeros_like(pattern[..., 0])
    rebuilt, sink = softmax_with_sink(call.rows(rows).scores(), call.rule.sinks)
    return rebuilt if too_coarse else pattern, sink


def _stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Stack layers on the first one's device (layers may live on several)."""
    return torch.stack([t.to(tensors[0].device) for t in tensors], dim=dim)


def require_finite(model: LensModel, layer: int, **tensors: Tensor) -> None:
    """Raise `NonFiniteError` if one of a layer's tensors holds NaN or infinity.

    Args:
        model: a wrapped model.
        layer: which.
        tensors: by what they hold ("keys").
    """
    for what, tensor in tensors.items():
        if not is_finite(tensor):
            raise NonFiniteError(
                f"{model.info.name}: the {what} of layer {layer} hold NaN or infinity on this prompt "
                f"(dtype {model.info.dtype}). In half precision, load the model in float32 or bfloat16."
            )
