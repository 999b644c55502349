"""Which heads' meta-gradients make the model answer as it does: exact knock-outs, and their first-order estimate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens._progress import Progress
from metaopt_lens._types import HeadRef
from metaopt_lens.interventions._answer_metric import Metric, answer_metric
from metaopt_lens.interventions._demo_tokens import DemoTokens
from metaopt_lens.interventions._head_effects import HeadEffects, rank_by_effect
from metaopt_lens.interventions._heads import Heads, head_mask
from metaopt_lens.interventions._knock_out_runs import KnockOutRuns
from metaopt_lens.interventions._recovery import split_queries
from metaopt_lens.models import LensModel, active_momentum, wrap
from metaopt_lens.prompts import ICLPrompt, PromptLike, as_prompts
from metaopt_lens.runs import refuse_acting, run_shared_prefix, tokenize_all


def head_effects(
    model: Any,
    prompts: PromptLike | Sequence[PromptLike],
    *,
    metric: Metric = "logit_difference",
    heads: Heads = None,
    layers: Iterable[int] | None = None,
    exact: bool = True,
    per_demo: bool = False,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadEffects:
    """What every head's meta-gradient does to the model's answers.

    A head's effect is the metric of the in-context run minus the metric with this head's demonstrations knocked out at
    every position of the query (docs/theory.md, section 5): exactly, one run per head; and to first order, from one
    backward pass. The demonstrations are run once, and a knock-out starts at the layer it touches. To see how many
    heads make the in-context gain, heads are ranked on one half of the queries and added back in that order on the
    other half, which had no say in the ranking. With a single query, or with some heads only, how many heads recover
    the gain is undefined.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: queries behind the same demonstrations, each with its label, in the forms `decompose` takes.
        metric: ``"logit_difference"``, the label's first token against the mean of the other candidates';
            ``"label_log_prob"``, mean log-probability of the label's tokens; ``"loss"``, its negative; or a function of
            the logits that follow the query, ``[d_vocab]``, that gives a number.
        heads: only these heads (as in ``["L3H7"]``).
        layers: only heads of these layers.
        exact: False for the first-order estimates alone.
        per_demo: also knock out every demonstration in every head (as many runs as heads times demonstrations).
        prepend_bos: put BOS first; None for the model's default.
        batch_size: runs made together; by default as many as memory allows.
        seed: of the split into queries to rank heads on and queries to measure the recovery on.
        progress: show a bar (on a terminal) or log the time left (elsewhere).

    Raises:
        PromptError: no prompts, different demonstrations, or no label or candidates where the metric needs them.
        HeadError: an unknown head or layer, or none selected.
        OptionError: an unknown metric, `per_demo` without `exact`, or momentum attention is on.
        ContextWindowError: a prompt is longer than the context window.
    """
    wrapped = wrap(model)
    refuse_acting(wrapped, "head_effects")
    if active_momentum(wrapped) is not None:
        raise OptionError(
            "momentum attention is on, and head_effects does not know its share: call it outside the block."
        )
    if per_demo and not exact:
        raise OptionError("per_demo=True knocks demonstrations out of heads exactly: give it with exact=True.")
    mask = head_mask(wrapped.info, heads, layers)
    parsed = as_prompts(prompts)
    _check_same_demos(parsed)
    tokens = tokenize_all(wrapped, parsed, prepend_bos=prepend_bos, require_demos=True)
    measured = answer_metric(wrapped, parsed, tokens, metric)
    demos = DemoTokens.of(tokens[0])
    prefix = run_shared_prefix(wrapped, demos.ids)
    assert prefix is not None  # there is at least one demonstration
    work = _Work(wrapped, mask, n_queries=len(parsed), n_demos=len(demos.spans), seed=seed)
    with Progress(work.n_runs(exact=exact, per_demo=per_demo), "knock-outs", shown=progress) as bar:
        runs = KnockOutRuns(wrapped, demos, prefix, measured, batch_size, bar.advance)
        found = work.estimates(runs)
        if exact:
            found |= work.knock_outs(runs, found["in_context"], found["zero_shot"])
        if per_demo:
            found["demo_exact_per_head"] = work.per_demo(runs, found["in_context"])
    texts = parsed[0].demos
    return HeadEffects(model=wrapped.info, metric=measured.name, n_demos=len(texts), demos=texts, **found)


def _check_same_demos(prompts: Sequence[ICLPrompt]) -> None:
    first = prompts[0]
    for prompt in prompts[1:]:
        for what in ("template", "instruction", "demos"):
            if getattr(prompt, what) != getattr(first, what):
                raise PromptError(
                    f"queries must stand behind the same demonstrations: the {what} of query {prompt.query!r} are not "
                    f"those of {first.query!r}. Call head_effects once for each set."
                )


class _Work(NamedTuple):
    """Which knock-outs are made, and the fields of the result that they give."""

    model: LensModel
    mask: Bool[Tensor, "layer head"]
    n_queries: int
    n_demos: int
    seed: int

    @property
    def all_heads(self) -> bool:
        return bool(self.mask.all())

    def n_runs(self, *, exact: bool, per_demo: bool) -> int:
        """Knock-outs in all, each of one query."""
        n_heads, n_held_out = int(self.mask.sum()), len(self._split()[1])
        n_variants = 1 + exact * (n_heads + self.n_demos) + per_demo * n_heads * self.n_demos
        return n_variants * self.n_queries + ((n_heads + 1) * n_held_out if exact and self.all_heads else 0)

    def estimates(self, runs: KnockOutRuns) -> dict[str, Any]:
        """The metric of both ends, first-order estimates, and nothing yet of what is measured exactly."""
        info = self.model.info
        in_context, found = runs.first_order(torch.cat([self._all_demos(1), self._each_demo()]))
        every = torch.ones(1, info.n_layers, info.n_heads, dtype=torch.bool)
        return {
            "in_context": in_context,
            "zero_shot": runs.exact(every, self._all_demos(1))[0],
            "exact": self._nothing(),
            "first_order": found[0].masked_fill(~self.mask, torch.nan),
            "demo_exact": torch.full((self.n_queries, self.n_demos), torch.nan, dtype=torch.float64),
            "demo_first_order": found[1:].permute(1, 2, 3, 0),  # query layer head demo
            "demo_exact_per_head": None,
            "held_out": torch.empty(0, dtype=torch.int64),
            "selection_order": torch.empty(0, dtype=torch.int64),
            "added": torch.empty(0, 0, dtype=torch.float64),
        }

    def knock_outs(
        self, runs: KnockOutRuns, in_context: Float[Tensor, " query"], zero_shot: Float[Tensor, " query"]
    ) -> dict[str, Any]:
        """Effects of heads and demonstrations, and, of all heads, the recovery."""
        info = self.model.info
        each = self._each_head()
        exact = self._nothing()
        exact[:, self.mask] = (in_context - runs.exact(each, self._all_demos(len(each)))).T
        every = torch.ones(self.n_demos, info.n_layers, info.n_heads, dtype=torch.bool)
        demo_exact = (in_context - runs.exact(every, self._each_demo())).T
        found: dict[str, Any] = {"exact": exact, "demo_exact": demo_exact}
        return found | (self._recovery(runs, exact, in_context - zero_shot) if self.all_heads else {})

    def per_demo(self, runs: KnockOutRuns, in_context: Float[Tensor, " query"]) -> Float[Tensor, "query layer head d"]:
        """Effects of every demonstration in every head."""
        each, found = self._each_head(), self._nothing()[..., None].repeat(1, 1, 1, self.n_demos)
        for demo, hidden in enumerate(self._each_demo()):
            without = runs.exact(each, hidden.expand(len(each), -1))
            found[:, self.mask, demo] = (in_context - without).T
        return found

    def _recovery(
        self, runs: KnockOutRuns, exact: Float[Tensor, "query layer head"], gain: Float[Tensor, " query"]
    ) -> dict[str, Any]:
        """Heads ranked on some queries, and the metric of the others with the first n of them in place."""
        selection, held_out = self._split()
        ranked = rank_by_effect(exact[selection].mean(0), gain[selection])
        order = torch.tensor([self._index(ref) for ref in ranked])
        out = torch.ones(len(order) + 1, len(order), dtype=torch.bool)
        for n, index in enumerate(order.tolist()):
            out[n + 1 :, index] = False
        added = torch.empty(len(out), 0, dtype=torch.float64)
        if held_out:
            # variant (layer head) -> variant layer head
            added = runs.exact(out.view(-1, *self.mask.shape), self._all_demos(len(out)), held_out)
        return {"held_out": torch.tensor(held_out, dtype=torch.int64), "selection_order": order, "added": added.T}

    def _split(self) -> tuple[list[int], list[int]]:
        return split_queries(self.n_queries, self.seed)

    def _index(self, ref: HeadRef) -> int:
        return ref.layer * self.mask.shape[1] + ref.head

    def _nothing(self) -> Float[Tensor, "query layer head"]:
        return torch.full((self.n_queries, *self.mask.shape), torch.nan, dtype=torch.float64)

    def _all_demos(self, n: int) -> Bool[Tensor, "variant demo"]:
        return torch.ones(n, self.n_demos, dtype=torch.bool)

    def _each_demo(self) -> Bool[Tensor, "demo demo"]:
        return torch.eye(self.n_demos, dtype=torch.bool)

    def _each_head(self) -> Bool[Tensor, "variant layer head"]:
        """The heads asked for, one at a time."""
        at = self.mask.flatten().nonzero()[:, 0]
        each = torch.zeros(len(at), self.mask.numel(), dtype=torch.bool)
        each[torch.arange(len(at)), at] = True
        return each.view(-1, *self.mask.shape)  # variant (layer head) -> variant layer head
