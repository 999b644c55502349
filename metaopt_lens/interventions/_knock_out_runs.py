"""Many knock-outs of many queries behind the same demonstrations: each starts at the first layer that it touches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaopt_lens.dual import attend
from metaopt_lens.interventions._answer_metric import AnswerMetric
from metaopt_lens.interventions._demo_tokens import DemoTokens
from metaopt_lens.models import AttentionCall, Hook, Late, LensModel, Prefix, Readout, Start
from metaopt_lens.runs import batches, choose_batch_size, map_batches

_N_STEPS = 6  # in which the layers are climbed: more of them share more, and take more passes
_HELD = 1 << 26  # numbers in the residual streams that are held between them


# What was knocked out below a layer, and of which query: all that a residual stream depends on.
_State = tuple[bytes, int]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What is knocked out, in every variant.

    Attributes:
        heads: which heads.
        demos: which demonstrations they do not see.
        hidden: the same as sources of the prefix.
    """

    heads: Bool[Tensor, "variant layer head"]
    demos: Bool[Tensor, "variant demo"]
    hidden: Bool[Tensor, "variant src"]

    def below(self, variant: int, layer: int) -> bytes:
        """What is knocked out below a layer: equal for variants that do not differ there."""
        return b"".join(mask.numpy().tobytes() for mask in (self.demos[variant], self.heads[variant, :layer]))

    def alike(self, layer: int) -> list[list[int]]:
        """Variants with something knocked out below a layer, in groups that do not differ there."""
        groups: dict[bytes, list[int]] = {}
        for variant in self.heads[:, :layer].flatten(1).any(1).nonzero()[:, 0].tolist():  # variant (layer head)
            groups.setdefault(self.below(variant, layer), []).append(variant)
        return list(groups.values())

    def first(self, variant: int) -> int:
        """The lowest layer with a head knocked out."""
        return int(self.heads[variant].any(-1).nonzero()[0])


@dataclass(frozen=True, eq=False)
class KnockOutRuns:
    """Queries behind the same demonstrations, to be run with any heads and demonstrations knocked out.

    The in-context pass is run once. A knock-out starts at the first layer that it touches, from the residual stream of
    that pass, and ends where logits are read; nothing below is run again, nor what several knock-outs have in common.

    Attributes:
        model: a wrapped model.
        demos: where S and the demonstrations stand.
        prefix: what they leave behind.
        metric: what is measured of every query.
        batch_size: sequences run together; by default as many as memory allows.
        finished: called with how many knock-outs were made since, in fractions.
    """

    model: LensModel
    demos: DemoTokens
    prefix: Prefix
    metric: AnswerMetric
    batch_size: int | None = None
    finished: Callable[[float], None] = field(default=lambda _: None)

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
        chosen = list(range(len(self.metric.rows)) if queries is None else queries)
        found = torch.empty(len(heads), len(chosen), dtype=torch.float64)
        size = self._queries_at_once(len(heads))
        for start in range(0, len(chosen), size):
            found[:, start : start + size] = self._climb(heads, demos, chosen[start : start + size])
        return found

    def _climb(
        self, heads: Bool[Tensor, "variant layer head"], demos: Bool[Tensor, "variant demo"], queries: Sequence[int]
    ) -> Float[Tensor, "variant query"]:
        """`exact`, a few layers at a time, each step from the residual streams that the one before has left."""
        chosen, n_layers = _Chosen(heads, demos, self._hidden(demos)), self.model.info.n_layers
        values = torch.tensor([self._in_context[query][1] for query in queries], dtype=torch.float64)
        values = values.repeat(len(heads), 1)
        step = max(1, n_layers // _N_STEPS)
        streams: dict[_State, Tensor] = {}
        for start in range(0, n_layers, step):
            stop = min(start + step, n_layers)
            groups = chosen.alike(stop)
            n_untouched = len(heads) - sum(map(len, groups))
            self.finished(n_untouched * len(queries) * (stop - start) / n_layers)
            streams = self._step(chosen, groups, queries, streams, start, stop)
        for group in groups:
            for column, query in enumerate(queries):
                values[group, column] = float(streams[chosen.below(group[0], n_layers), query])
        return values

    def _step(
        self,
        chosen: _Chosen,
        groups: Sequence[Sequence[int]],
        queries: Sequence[int],
        entering: Mapping[_State, Tensor],
        start: int,
        stop: int,
    ) -> dict[_State, Tensor]:
        """Every group's residual stream before layer `stop`, or its metric after the last; batches span groups."""
        rows, reached = self.metric.rows, dict[_State, Tensor]()
        by_first: dict[int, list[tuple[Sequence[int], int]]] = {}
        for group in groups:
            by_first.setdefault(max(start, chosen.first(group[0])), []).extend((group, query) for query in queries)
        for first, items in sorted(by_first.items()):

            def run(batch: list[tuple[Sequence[int], int]], first: int = first) -> list[Tensor]:
                return self._pass(chosen, [(group[0], query) for group, query in batch], entering, first, stop)

            for indices, results in batches(items, lambda item: len(rows[item[1]]), run, batch_size=self._size()):
                for index, result in zip(indices, results, strict=True):
                    group, query = items[index]
                    reached[chosen.below(group[0], stop), query] = result
                    self.finished(len(group) * (stop - start) / self.model.info.n_layers)
        return reached

    def _pass(
        self,
        chosen: _Chosen,
        batch: Sequence[tuple[int, int]],
        entering: Mapping[_State, Tensor],
        first: int,
        stop: int,
    ) -> list[Tensor]:
        """Knock-outs of queries from layer `first` to `stop`; what entered `first` untouched is in context."""
        variants = torch.tensor([variant for variant, _ in batch])
        queries = [query for _, query in batch]
        begin = None
        if first > 0:
            streams = [
                entering.get((chosen.below(variant, first), query), self._in_context[query][0][first])
                for variant, query in batch
            ]
            begin = Start(first, pad_sequence(streams, batch_first=True))
        hooks: list[Hook] = []
        for layer in range(first, stop):
            heads = chosen.heads[variants, layer]
            if bool(heads.any()):
                hooks += self._hooks(layer, knocked_out(heads, chosen.hidden[variants]))
        with torch.no_grad():
            if stop == self.model.info.n_layers:
                return self._metrics(queries, hooks, start=begin)
            return self._streams(queries, hooks, start=begin, until=stop)

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
        return torch.stack([self.demos.mask(row.nonzero()[:, 0].tolist(), self.demos.stop) for row in demos])

    def _hooks(self, layer: int, use: Callable[[AttentionCall], Tensor | None]) -> list[Hook]:
        return self.model.attention_hooks(layer, use, prefix=self.prefix)

    def _metrics(
        self, queries: Sequence[int], hooks: Sequence[Hook], *, start: Start | None = None, grad: bool = False
    ) -> list[Tensor]:
        """The metric of queries, from one pass."""
        metric = self.metric
        read = Readout(pad_sequence([metric.positions[query] for query in queries], batch_first=True), metric.tokens)
        logits = self.model.run(
            self._tokens(queries), prefix=self.prefix, hooks=hooks, start=start, read=read, grad=grad
        )
        assert logits is not None
        return [
            metric.value(logits[index, : len(metric.positions[query])], query) for index, query in enumerate(queries)
        ]

    def _streams(
        self, queries: Sequence[int], hooks: Sequence[Hook], *, start: Start | None, until: int
    ) -> list[Tensor]:
        """The residual stream of queries that enters a layer, ``[pos, d_model]`` each."""
        tokens = self._tokens(queries)
        stream = self.model.run(tokens, prefix=self.prefix, hooks=hooks, start=start, until=until)
        assert stream is not None
        return [stream[index, : len(self.metric.rows[query])].clone() for index, query in enumerate(queries)]

    def _tokens(self, queries: Sequence[int]) -> Int[Tensor, "batch pos"]:
        return pad_sequence([torch.tensor(self.metric.rows[query]) for query in queries], batch_first=True)

    def _queries_at_once(self, n_variants: int) -> int:
        """How many queries' residual streams may be held."""
        longest = max(map(len, self.metric.rows))
        return max(1, _HELD // (n_variants * longest * self.model.info.d_model))

    def _size(self) -> int:
        if self.batch_size is not None:
            return self.batch_size
        longest, n_read = (max(map(len, of)) for of in (self.metric.rows, self.metric.positions))
        return choose_batch_size(self.model, n_new=longest, n_prefix=self.demos.stop, n_read=n_read)


def _padded(hidden: Bool[Tensor, "*variant prefix"], call: AttentionCall) -> Bool[Tensor, "*variant src"]:
    """Sources of the prefix to hide, as a mask over all sources of a call."""
    return torch.nn.functional.pad(hidden, (0, call.k.shape[1] - hidden.shape[-1])).to(call.z.device)


def _without_each(call: AttentionCall, hidden: Bool[Tensor, "variant prefix"]) -> list[Tensor]:
    """z of all rows with the sources of each variant hidden, q, k and v unchanged; the scores are computed once."""
    scores = call.scores()
    return [
        attend(scores, call.v, sinks=call.rule.sinks, hidden=mask)[0].to(call.z.dtype) for mask in _padded(hidden, call)
    ]


def knocked_out(
    chosen: Bool[Tensor, "row head"], hidden: Bool[Tensor, "row prefix"]
) -> Callable[[AttentionCall], Tensor]:
    """What replaces z of a layer where heads do not see sources of the prefix, q, k and v unchanged.

    Args:
        chosen: heads, of every row of the batch.
        hidden: which sources they do not see.
    """
    rows = chosen.any(1).nonzero()[:, 0]

    def edit(call: AttentionCall) -> Tensor:
        at = rows.to(call.z.device)
        some = call if len(rows) == len(call.z) else call.rows(at)  # no copy of keys and values where all rows are
        without = some.attend(_padded(hidden[rows], call)[:, None, None])[0]
        z = call.z.clone()
        z[at] = torch.where(chosen[rows].to(z.device)[:, None, :, None], without, z[at])
        return z

    return edit
