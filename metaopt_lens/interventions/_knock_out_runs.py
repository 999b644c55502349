"""Many knock-outs of many queries behind the same demonstrations: each starts at the first layer that it touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt_lens.dual import attend
from metaopt_lens.interventions._answer_metric import AnswerMetric
from metaopt_lens.interventions._meta_gradient import MetaGradient
from metaopt_lens.models import AttentionCall, Hook, Late, LensModel, Readout, Start
from metaopt_lens.runs import batches, choose_batch_size, map_batches


@dataclass(frozen=True, eq=False)
class KnockOutRuns:
    """Queries behind a meta-gradient's demonstrations, to be run with any heads and demonstrations knocked out.

    The in-context pass is run once. A knock-out starts at the first layer that it touches, from the residual stream of
    that pass, and ends where logits are read; those that start at one layer share their batches.

    Attributes:
        model: a wrapped model.
        meta_gradient: the demonstrations.
        metric: what is measured of every query.
        batch_size: sequences run together; by default as many as memory allows.
        finished: called with the number of knock-outs that were run, after every batch.
    """

    model: LensModel
    meta_gradient: MetaGradient
    metric: AnswerMetric
    batch_size: int | None = None
    finished: Callable[[int], None] = field(default=lambda _: None)

    @property
    def in_context(self) -> Float[Tensor, " query"]:
        """The metric with nothing knocked out."""
        return torch.tensor([value for _, value in self._in_context], dtype=torch.float64)

    def exact(
        self,
        heads: Bool[Tensor, "variant layer head"],
        demos: Bool[Tensor, "variant demo"],
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "variant query"]:
        """The metric of queries with heads not seeing demonstrations, at all positions of the query.

        Args:
            heads: which heads, of every knock-out.
            demos: which demonstrations they do not see.
            queries: which queries; all by default.
        """
        chosen = range(len(self.metric.rows)) if queries is None else queries
        hidden = self._hidden(demos)
        found = torch.empty(len(heads), len(chosen), dtype=torch.float64)
        first = [next(iter(touched.nonzero()[:, 0].tolist()), None) for touched in heads.any(-1)]
        for start in sorted({layer for layer in first if layer is not None}):
            items = [(v, column) for v, layer in enumerate(first) if layer == start for column in range(len(chosen))]

            def run(batch: list[tuple[int, int]], start: int = start) -> list[Tensor]:
                variants = torch.tensor([variant for variant, _ in batch])
                hooks: list[Hook] = []
                for layer in range(start, self.model.info.n_layers):
                    if bool(heads[variants, layer].any()):
                        hooks += self._hooks(layer, _knocked_out(heads[variants, layer], hidden[variants]))
                with torch.no_grad():
                    return self._metrics([chosen[column] for _, column in batch], hooks, start=start)

            def length(item: tuple[int, int]) -> int:
                return len(self.metric.rows[chosen[item[1]]])

            for indices, values in batches(items, length, run, batch_size=self._size()):
                for index, value in zip(indices, values, strict=True):
                    found[items[index]] = float(value)
                self.finished(len(indices))
        for variant, layer in enumerate(first):
            if layer is None:
                found[variant] = self.in_context[list(chosen)]
        return found

    def first_order(
        self, demos: Bool[Tensor, "variant demo"]
    ) -> tuple[Float[Tensor, " query"], Float[Tensor, "variant query layer head"]]:
        """The metric in context, and an estimate of what hiding demonstrations from each head alone takes away.

        ``sum over positions of dM/dz . (z - z_without)``: M with the head's part minus M without it, to first order;
        from one backward pass for each query.

        Args:
            demos: which demonstrations are hidden, of every variant.
        """
        hidden = self._hidden(demos)

        def run(batch: list[int]) -> list[tuple[Tensor, Tensor]]:
            calls: list[AttentionCall] = []
            added: list[Tensor] = []

            def mark(call: AttentionCall) -> Tensor:
                calls.append(call)
                added.append(torch.zeros_like(call.z, requires_grad=True))
                return call.z + added[-1]

            hooks = [hook for layer in range(self.model.info.n_layers) for hook in self._hooks(layer, mark)]
            with torch.enable_grad():
                values = torch.stack(self._metrics(batch, hooks, grad=True))
                gradients = torch.autograd.grad(values.sum(), added)
            estimates = torch.empty(len(batch), len(demos), len(calls), self.model.info.n_heads, dtype=torch.float64)
            with torch.no_grad():
                for call, gradient in zip(calls, gradients, strict=True):
                    for variant, z in enumerate(_without_each(call, hidden)):
                        estimates[:, variant, call.layer] = (gradient * (call.z - z)).sum((1, 3)).double().cpu()
            return list(zip(values.detach().double().cpu(), estimates, strict=True))

        size = max(1, self._size() // 4)  # the graph is kept
        rows = self.metric.rows
        found = map_batches(list(range(len(rows))), lambda query: len(rows[query]), run, batch_size=size)
        values, estimates = zip(*found, strict=True)
        return torch.stack(values), torch.stack(estimates, dim=1)

    @cached_property
    def _in_context(self) -> list[tuple[list[Tensor], float]]:
        """Of every query: the residual stream before each layer, ``[pos, d_model]``, and the metric."""

        def run(batch: list[int]) -> list[tuple[list[Tensor], float]]:
            streams: list[list[Tensor]] = [[] for _ in batch]

            def keep(tensor: Tensor) -> None:
                for number, query in enumerate(batch):
                    streams[number].append(tensor[number, : len(self.metric.rows[query])].clone())

            layers = range(self.model.info.n_layers)
            hooks: list[Hook] = [(self.model.residual_hook("pre", layer), Late(keep)) for layer in layers]
            with torch.no_grad():
                values = self._metrics(batch, hooks)
            return list(zip(streams, map(float, values), strict=True))

        rows = self.metric.rows
        return map_batches(list(range(len(rows))), lambda query: len(rows[query]), run, batch_size=self._size())

    def _hidden(self, demos: Bool[Tensor, "variant demo"]) -> Bool[Tensor, "variant src"]:
        tokens = self.meta_gradient.tokens
        return torch.stack([tokens.mask(row.nonzero()[:, 0].tolist(), tokens.stop) for row in demos])

    def _hooks(self, layer: int, use: Callable[[AttentionCall], Tensor | None]) -> list[Hook]:
        return self.model.attention_hooks(layer, use, prefix=self.meta_gradient.prefix)

    def _metrics(
        self, queries: Sequence[int], hooks: Sequence[Hook], *, start: int = 0, grad: bool = False
    ) -> list[Tensor]:
        """One pass over queries, from a layer upwards."""
        metric = self.metric
        tokens = pad_sequence([torch.tensor(metric.rows[query]) for query in queries], batch_first=True)
        read = Readout(pad_sequence([metric.positions[query] for query in queries], batch_first=True), metric.tokens)
        begin = None
        if start > 0:
            streams = [self._in_context[query][0][start] for query in queries]
            begin = Start(start, pad_sequence(streams, batch_first=True))
        logits = self.model.run(
            tokens, prefix=self.meta_gradient.prefix, hooks=hooks, start=begin, read=read, grad=grad
        )
        assert logits is not None
        return [
            metric.value(logits[index, : len(metric.positions[query])], query) for index, query in enumerate(queries)
        ]

    def _size(self) -> int:
        if self.batch_size is not None:
            return self.batch_size
        longest, n_read = (max(map(len, of)) for of in (self.metric.rows, self.metric.positions))
        return choose_batch_size(self.model, n_new=longest, n_prefix=self.meta_gradient.tokens.stop, n_read=n_read)


def _padded(hidden: Bool[Tensor, "*variant prefix"], call: AttentionCall) -> Bool[Tensor, "*variant src"]:
    """Sources of the prefix to hide, as a mask over all sources of a call."""
    return torch.nn.functional.pad(hidden, (0, call.k.shape[1] - hidden.shape[-1])).to(call.z.device)


def _without_each(call: AttentionCall, hidden: Bool[Tensor, "variant prefix"]) -> list[Tensor]:
    """z of all rows with the sources of each variant hidden, q, k and v unchanged; the scores are computed once."""
    scores = call.scores()
    return [
        attend(scores, call.v, sinks=call.rule.sinks, hidden=mask)[0].to(call.z.dtype) for mask in _padded(hidden, call)
    ]


def _knocked_out(
    chosen: Bool[Tensor, "row head"], hidden: Bool[Tensor, "row prefix"]
) -> Callable[[AttentionCall], Tensor]:
    rows = chosen.any(1).nonzero()[:, 0]

    def edit(call: AttentionCall) -> Tensor:
        at = rows.to(call.z.device)
        without = call.rows(at).attend(_padded(hidden[rows], call)[:, None, None])[0]
        z = call.z.clone()
        z[at] = torch.where(chosen[rows].to(z.device)[:, None, :, None], without, z[at])
        return z

    return edit
