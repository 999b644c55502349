"""What is seen of a batch of rows while a pass runs: it becomes their `Run`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    """What is seen of the rows while a pass runs: quantities by name and layer, at every row's destinations."""

    def __init__(self, model: LensModel, prefix: Prefix | None, rows: Sequence[Row], keep: Keep) -> None:
        self._model, self._prefix, self._rows, self._keep = model, prefix, rows, keep
        self._offset = 0 if prefix is None else prefix.n_tokens
        self._n_seeing = sum(row.setting not in MATCHED for row in rows)
        self._eta = active_momentum(model)
        self._rules: list[ScoreRule] = []
        self._seen: dict[str, dict[int, Tensor]] = {}
        self._excess: list[Tensor] = []  # per layer: how far heads are from their parts
        self._destinations = _destinations(rows, self._offset)
        self._matched = [row.setting == "zs_matched" for row in rows]

    @property
    def ids(self) -> Int[Tensor, "batch pos"]:
        """Token ids of the queries, padded on the right."""
        return pad_sequence([torch.tensor(row.tokens.ids[self._offset :]) for row in self._rows], batch_first=True)

    @property
    def readout(self) -> Readout:
        """The destinations, whose logits are read."""
        return Readout(self._destinations)

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
        if keep.own_stream and any(self._matched):
            hooks.append((model.residual_hook("pre", layer), partial(self._keep_own_stream, layer)))
        if keep.stream:
            hooks.append((model.hook_name("mlp_out", layer), self._keeper("mlp", layer)))
            if layer == 0:
                hooks.append((model.residual_hook("pre", layer), self._keeper("start", layer)))
        if layer == model.info.n_layers - 1:
            end = model.residual_hook("post", layer)
            hooks += [(end, self._keeper("residual", layer + 1))] if keep.residual else []
            hooks += [(end, self._keeper("end", layer))] if keep.stream else []
        return hooks

    def runs(self, logits: Tensor | None) -> list[Run]:
        """The finished run of every row.

        Args:
            logits: at the destinations of every row, if they are kept.
        """
        self._require_sound()
        layered = {name: _stack([at[i] for i in sorted(at)], 1) for name, at in self._seen.items()}
        return [self._run(row, layered, logits) for row in range(len(self._rows))]

    def _run(self, row: int, layered: Mapping[str, Tensor], logits: Tensor | None) -> Run:
        """Copies of what is one row's, so that no run keeps the whole batch's tensors alive."""
        item = self._rows[row]
        n_dst, n_src = len(item.destinations), item.tokens.n_tokens
        found: dict[str, Any] = {}
        for name, tensor in layered.items():
            if name == "own_stream" and not self._matched[row]:
                continue
            if name.startswith("own"):
                number = sum(self._matched[:row]) if name == "own_stream" else row
                found[name] = tensor[number, :, : n_src - self._offset].clone()
            else:
                here = tensor[row, :, :n_dst, ..., :n_src] if name == "pattern" else tensor[row, :, :n_dst]
                found[name] = here.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        return Run(
            setting=item.setting,
            model=self._model.info,
            tokens=item.tokens,
            destinations=item.destinations,
            prefix=self._prefix,
            rules=tuple(self._rules),
            eta=self._eta if self._eta is None or found["z"].requires_grad else self._eta.detach(),
            stream=self._stream(found) if self._keep.stream else None,
            **{name: tensor for name, tensor in found.items() if name not in _STREAM},
            **self._asked(row, logits),
        )

    def _stream(self, found: Mapping[str, Tensor]) -> Stream:
        start, end = (found[name][:, 0] for name in ("start", "end"))
        mlp = end.new_zeros(len(end), self._model.info.n_layers, end.shape[-1])  # 0 in attention-only blocks
        if "mlp" in found:
            mlp = mlp.index_copy(1, torch.tensor(sorted(self._seen["mlp"]), device=end.device), found["mlp"])
        return Stream(start, end, mlp)

    def _require_sound(self) -> None:
        """Every layer is finite, and z is the sum of its parts."""
        names = {"queries": "q", "keys": "own_k", "values": "own_v", "outputs": "z"}
        for layer in range(self._model.info.n_layers):
            require_finite(self._model, layer, **{what: self._seen[key][layer] for what, key in names.items()})
            if self._excess:
                require_parts(self._model, layer, self._excess[layer])

    def _attention(self, call: AttentionCall) -> Tensor | None:
        """Keep a layer's attention; hide D from the position-matched rows, whose z is replaced."""
        self._rules.append(call.rule)
        n, at = self._n_seeing, self._destinations.to(call.z.device)
        (pattern, sink), z = _pattern(call, slice(n)), call.z
        weights = _chosen(pattern.transpose(1, 2), at[:n])  # row dst head src
        if n:
            self._excess.append(self._off_its_parts(call, at[:n], weights))
        to_sink = _chosen(sink.mT, at[:n])  # row dst head
        if n < len(self._rows):
            hidden = self._without_demos(call)
            z = torch.cat([z[:n], hidden.z])
            weights = torch.cat([weights, _chosen(hidden.pattern.transpose(1, 2), at[n:])])
            to_sink = torch.cat([to_sink, _chosen(hidden.sink.mT, at[n:])])
        # Copies, so that nothing keeps the pass's own tensors alive.
        for name, tensor in {
            "q": _chosen(call.q, at),
            "z": _chosen(z, at),
            "pattern": weights,
            "sink": to_sink,
            "own_k": call.k[:, self._offset :].clone(),
            "own_v": call.v[:, self._offset :].clone(),
        }.items():
            self._seen.setdefault(name, {})[call.layer] = tensor
        return None if n == len(self._rows) else z

    def _off_its_parts(
        self, call: AttentionCall, at: Int[Tensor, "row dst"], pattern: Float[Tensor, "row dst head src"]
    ) -> Float[Tensor, " head"]:
        """How far z is from its parts. Position-matched rows are made of scores: then the pattern is checked too."""
        eta = None if self._eta is None else self._eta[call.layer]
        matched = self._n_seeing < len(self._rows)
        seeing = call if not matched else call.rows(slice(self._n_seeing))
        return excess_over_parts(seeing, at, pattern.transpose(1, 2), eta, with_pattern=matched)

    def _keep_own_stream(self, layer: int, stream: Tensor) -> None:
        self._seen.setdefault("own_stream", {})[layer] = stream[torch.tensor(self._matched, device=stream.device)]

    def _without_demos(self, call: AttentionCall) -> _Hidden:
        """Attention of the position-matched rows."""
        rows = slice(self._n_seeing, None)
        demos = self._rows[-1].tokens.demonstrations
        hidden = call.inside(demos)
        z, seen, sink = call.rows(rows).without(hidden).attend()
        none = seen.new_zeros(*seen.shape[:-1], len(demos))
        pattern = torch.cat([seen[..., : demos.start], none, seen[..., demos.start :]], dim=-1)
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

    def _keeper(self, name: str, layer: int) -> Callable[[Tensor], None]:
        def use(tensor: Tensor) -> None:
            self._seen.setdefault(name, {})[layer] = _chosen(tensor, self._destinations.to(tensor.device))

        return use


@dataclass(frozen=True)
class _Hidden:
    """Attention of some rows of a batch with D hidden from them."""

    z: Float[Tensor, "rows dst head d_head"]
    pattern: Float[Tensor, "rows head dst src"]
    sink: Float[Tensor, "rows head dst"]


def _destinations(rows: Sequence[Row], offset: int) -> Int[Tensor, "row dst"]:
    """Counted from a row's first new token; a row with fewer than others repeats its last."""
    longest = max(len(row.destinations) for row in rows)
    filled = [[*row.destinations, *[row.destinations[-1]] * (longest - len(row.destinations))] for row in rows]
    return torch.tensor(filled) - offset


def _chosen(tensor: Float[Tensor, "row pos *rest"], at: Int[Tensor, "row dst"]) -> Float[Tensor, "row dst *rest"]:
    """A copy of the chosen positions of every row."""
    return tensor[torch.arange(len(at), device=at.device)[:, None], at]


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
