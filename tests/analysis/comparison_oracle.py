"""What a comparison must say, from models whose own weights are changed, read by the host's own hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from families import bridge_of
from hosts import host_values, host_z, mask_query_to_demos, shared, tokenized
from own_parameters import OwnParameters
from torch import Tensor

from metaopt_lens import ICLPrompt
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.prompts import TokenizedPrompt


def changed_copy(name: str, update: WeightUpdate, dtype: torch.dtype, *, layers: Sequence[int] | None = None) -> Any:
    """A model with the update in its own weights, in some layers only."""
    own = OwnParameters(name, dtype=dtype).copy()
    for field, change in update.tensors().items():
        for layer in layers if layers is not None else range(own.n_layers):
            own.add_(layer, field[-1], field[0], change[layer])
    return own.model if name.startswith("hooked") else bridge_of(own.model)


@dataclass
class Oracle:
    """Everything about one prompt; heads are query heads, `z` is at the last token."""

    name: str
    prompt: ICLPrompt
    update: WeightUpdate
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.base = shared(self.name, self.dtype)
        self.tuned = changed_copy(self.name, self.update, self.dtype)
        self.tokens: TokenizedPrompt = tokenized(self.base, self.prompt)
        self.own = OwnParameters(self.name, dtype=self.dtype)
        self.group = self.own.n_heads // self.update.model.n_kv_heads

    # ---- runs ---------------------------------------------------------------------------------------------------

    @cached_property
    def z(self) -> dict[str, Tensor]:
        full, alone = self.tokens.ids, self.tokens.zero_shot().ids
        edits = mask_query_to_demos(self.base, self.tokens)
        return {
            "icl": host_z(self.base, full)[-1],
            "zs": host_z(self.base, alone)[-1],
            "ft": host_z(self.tuned, alone)[-1],
            "zsm": host_z(self.base, full, edits=edits)[-1],
            "ftm": host_z(self.tuned, full, edits=edits)[-1],
        }

    @cached_property
    def hidden(self) -> dict[str, Tensor]:
        runs = {"icl": (self.base, self.tokens), "zs": (self.base, self.tokens.zero_shot())}
        runs["ft"] = (self.tuned, self.tokens.zero_shot())
        return {k: torch.stack([h[-1] for h in host_values(m, t.ids, "attn.hook_out")]) for k, (m, t) in runs.items()}

    @cached_property
    def pattern(self) -> Tensor:
        """``[layer, head, src]`` from the last token, in context."""
        return torch.stack([p[:, -1] for p in host_values(self.base, self.tokens.ids, "attn.hook_pattern")])

    def scores(self, setting: str) -> Tensor:
        """``[layer, head, query token]`` before the softmax."""
        tokens = self.tokens if setting == "icl" else self.tokens.zero_shot()
        model = self.tuned if setting == "ft" else self.base
        return torch.stack(
            [s[:, -1, tokens.query.slice] for s in host_values(model, tokens.ids, "attn.hook_attn_scores")]
        )

    def context_scores(self) -> Tensor:
        """``[layer, demonstration token]``, no separators, summed over heads."""
        columns = [
            i
            for demo, label in zip(self.tokens.demos, self.tokens.labels, strict=True)
            for i in range(demo.start, label.stop)
        ]
        scores = host_values(self.base, self.tokens.ids, "attn.hook_attn_scores")
        return torch.stack([s[:, -1, columns].sum(0) for s in scores])

    # ---- exact form ---------------------------------------------------------------------------------------------

    @cached_property
    def values(self) -> Tensor:
        """``[layer, src, head, d_head]`` in context, repeated for grouped heads."""
        found = host_values(self.base, self.tokens.ids, "attn.hook_v")
        v = torch.stack([t.reshape(len(t), -1, self.own.d_head) for t in found])
        return v.repeat_interleave(self.group, dim=2)

    def meta_gradient(self) -> Tensor:
        d = self.tokens.demonstrations.slice
        return torch.einsum("lhs,lshd->lhd", self.pattern[:, :, d], self.values[:, d])

    def direct(self) -> Tensor:
        """z minus the same head with D masked out and the rest renormalised."""
        outside = torch.ones(self.tokens.n_tokens, dtype=torch.bool)
        outside[self.tokens.demonstrations.slice] = False
        rest = self.pattern[:, :, outside]
        without = torch.einsum("lhs,lshd->lhd", rest / rest.sum(-1, keepdim=True), self.values[:, outside])
        return self.z["icl"] - without

    def through_w_o(self, z: Tensor) -> Tensor:
        w_o = self.own.read("o")
        assert w_o is not None
        return torch.einsum("lhd,lhdm->lhm", z, w_o)

    # ---- linear form --------------------------------------------------------------------------------------------

    def _memory(self, model: Any, *, hide: bool) -> tuple[list[Tensor], list[Tensor]]:
        edits = mask_query_to_demos(model, self.tokens) if hide else ()
        keys = host_values(model, self.tokens.ids, self._hook("k"), edits=edits)
        values = host_values(model, self.tokens.ids, "attn.hook_v", edits=edits)
        shape = (self.tokens.n_tokens, -1, self.own.d_head)
        return [k.reshape(shape) for k in keys], [v.reshape(shape) for v in values]

    def _hook(self, kind: str) -> str:
        rotary = self.base.cfg.positional_embedding_type == "rotary"
        return f"attn.hook_rot_{kind}" if rotary else f"attn.hook_{kind}"

    @cached_property
    def q(self) -> Tensor:
        found = host_values(self.base, self.tokens.ids, self._hook("q"))
        return torch.stack([q.reshape(len(q), -1, self.own.d_head)[-1] for q in found])

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """dW_ICL and dW_FT, ``[layer, head, d_head, d_head]``, written out."""
        n = self.tokens.n_tokens
        in_d = torch.zeros(n, dtype=torch.bool)
        in_d[self.tokens.demonstrations.slice] = True
        scores = host_values(self.base, self.tokens.ids, "attn.hook_attn_scores")
        visible = [(s[:, -1] > -1e30).all(0) for s in scores]  # the host's causal and window mask
        k, v = self._memory(self.base, hide=False)
        k0, v0 = self._memory(self.base, hide=True)
        icl, ft = [], []
        for layer in range(self.own.n_layers):
            k1, v1 = self._memory(changed_copy(self.name, self.update, self.dtype, layers=[layer]), hide=True)
            d, z = in_d & visible[layer], ~in_d & visible[layer]
            icl.append(torch.einsum("shd,she->hde", v[layer][d], k[layer][d]))
            after = torch.einsum("shd,she->hde", v1[layer][z], k1[layer][z])
            ft.append(after - torch.einsum("shd,she->hde", v0[layer][z], k0[layer][z]))
        return tuple(torch.stack(m).repeat_interleave(self.group, dim=1) for m in (icl, ft))  # type: ignore[return-value]

    # ---- predictions --------------------------------------------------------------------------------------------

    def prediction(self, setting: str, labels: Sequence[Sequence[int]]) -> int:
        """The label with the highest mean log-probability of its tokens, each run by itself."""
        means = [torch.stack(self._label_log_probs(setting, label)).mean() for label in labels]
        return int(torch.stack(means).argmax())

    def probability(self, setting: str, label: Sequence[int]) -> float:
        """Of the whole label, the product over its tokens."""
        return float(torch.stack(self._label_log_probs(setting, label)).sum().exp())

    def rank(self, setting: str, token: int) -> int:
        """Rank of a token after the query, 1 for the most probable."""
        order = self._log_probs(setting, ())[-1].argsort(descending=True)
        return order.tolist().index(token) + 1

    def _label_log_probs(self, setting: str, label: Sequence[int]) -> list[Tensor]:
        log_probs = self._log_probs(setting, label)[-1 - len(label) :]
        return [log_probs[i, t] for i, t in enumerate(label)]

    def _log_probs(self, setting: str, label: Sequence[int]) -> Tensor:
        model = self.tuned if setting == "ft" else self.base
        ids = self.tokens.ids if setting == "icl" else self.tokens.zero_shot().ids
        with torch.no_grad():
            found: Tensor = model(torch.tensor([[*ids, *label]]))[0].log_softmax(-1)
        return found


def cos(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt())
