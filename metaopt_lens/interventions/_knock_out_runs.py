"""Many knock-outs of many queries behind the same demonstrations, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens.interventions._meta_gradient import MetaGradient
from metaopt_lens.models import AttentionCall, Hook, LensModel
from metaopt_lens.runs import choose_batch_size, map_batches

# Metric of each row: logits of the row's own tokens, and which query it is.
RowMetric = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class KnockOutRuns:
    """Queries behind a meta-gradient's demonstrations, to be run with any heads and demonstrations knocked out.

    Attributes:
        rows: token ids of each query (with the label's tokens that are fed, if any).
        metric: called with the logits of a row's tokens and the query's number.
    """

    model: LensModel
    meta_gradient: MetaGradient
    rows: Sequence[tuple[int, ...]]
    metric: RowMetric
    batch_size: int | None = None

    def exact(
        self,
        heads: Bool[Tensor, "variant layer head"],
        demos: Bool[Tensor, "variant demo"],
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "variant query"]:
        """The metric of queries (default: all) with heads not seeing demonstrations, at all positions of the query."""
        chosen_queries = range(len(self.rows)) if queries is None else queries
        items = [(variant, query) for variant in range(len(heads)) for query in chosen_queries]

        def run(batch: list[tuple[int, int]]) -> list[Tensor]:
            variants = torch.tensor([variant for variant, _ in batch])
            hidden = self._hidden(demos[variants])
            hooks: list[Hook] = []
            for layer in range(self.model.info.n_layers):
                chosen = heads[variants, layer]
                if bool(chosen.any()):
                    hooks += self._hooks(layer, _knocked_out(chosen, hidden))
            with torch.no_grad():
                return self._metrics([query for _, query in batch], hooks)

        values = map_batches(items, lambda item: len(self.rows[item[1]]), run, batch_size=self._size())
        found = torch.tensor([float(value) for value in values], dtype=torch.float64)
        return found.view(len(heads), len(chosen_queries))  # variant-major, as the items

    def first_order(self, demos: Bool[Tensor, "variant demo"]) -> Float[Tensor, "variant query layer head"]:
        """Estimate of what hiding demonstrations from each head alone takes away, from one backward pass per query.

        ``sum over positions of dM/dz . (z - z_without)``: M with the head's part minus M without it, to first order.
        """
        hidden = self._hidden(demos)

        def run(batch: list[int]) -> list[Tensor]:
            calls: list[AttentionCall] = []
            added: list[Tensor] = []

            def mark(call: AttentionCall) -> Tensor:
                calls.append(call)
                added.append(torch.zeros_like(call.z, requires_grad=True))
                return call.z + added[-1]

            hooks = [hook for layer in range(self.model.info.n_layers) for hook in self._hooks(layer, mark)]
            with torch.enable_grad():
                total = torch.stack(self._metrics(batch, hooks, grad=True)).sum()
                gradients = torch.autograd.grad(total, added)
            estimates = torch.empty(len(batch), len(demos), len(calls), self.model.info.n_heads, dtype=torch.float64)
            with torch.no_grad():
                for call, gradient in zip(calls, gradients, strict=True):
                    for variant, mask in enumerate(hidden):
                        change = call.z - _without(call, slice(None), mask[None].expand(len(batch), -1))
                        estimates[:, variant, call.layer] = (gradient * change).sum((1, 3)).double().cpu()
            return list(estimates)

        size = max(1, self._size() // 4)  # the graph is kept
        found = map_batches(list(range(len(self.rows))), lambda query: len(self.rows[query]), run, batch_size=size)
        return torch.stack(found, dim=1)

    def _hidden(self, demos: Bool[Tensor, "variant demo"]) -> Bool[Tensor, "variant src"]:
        tokens = self.meta_gradient.tokens
        return torch.stack([tokens.mask(row.nonzero()[:, 0].tolist(), tokens.stop) for row in demos])

    def _hooks(self, layer: int, use: Callable[[AttentionCall], Tensor | None]) -> list[Hook]:
        return self.model.attention_hooks(layer, use, prefix=self.meta_gradient.prefix)

    def _metrics(self, queries: Sequence[int], hooks: Sequence[Hook], *, grad: bool = False) -> list[Tensor]:
        rows = [self.rows[query] for query in queries]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        logits = self.model.run(tokens, prefix=self.meta_gradient.prefix, hooks=hooks, grad=grad)
        assert logits is not None
        return [
            self.metric(logits[index, : len(row)], query)
            for index, (query, row) in enumerate(zip(queries, rows, strict=True))
        ]

    def _size(self) -> int:
        longest = max(map(len, self.rows))
        return self.batch_size or choose_batch_size(self.model, n_new=longest, n_prefix=self.meta_gradient.tokens.stop)


def _without(
    call: AttentionCall, rows: Tensor | slice, hidden: Bool[Tensor, "row prefix"]
) -> Float[Tensor, "row dst head d_head"]:
    """z of some rows of the batch with sources of the prefix hidden, q, k and v unchanged."""
    padded = torch.nn.functional.pad(hidden, (0, call.k.shape[1] - hidden.shape[-1])).to(call.z.device)
    return call.rows(rows).attend(padded[:, None, None])[0]


def _knocked_out(
    chosen: Bool[Tensor, "row head"], hidden: Bool[Tensor, "row prefix"]
) -> Callable[[AttentionCall], Tensor]:
    rows = chosen.any(1).nonzero()[:, 0]

    def edit(call: AttentionCall) -> Tensor:
        at = rows.to(call.z.device)
        without = _without(call, at, hidden[rows])
        z = call.z.clone()
        z[at] = torch.where(chosen[rows].to(z.device)[:, None, :, None], without, z[at])
        return z

    return edit
