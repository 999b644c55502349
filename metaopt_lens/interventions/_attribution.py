"""Which heads' meta-gradients make the model answer as it does: exact knock-outs, and their first-order estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.interventions._head_effects import HeadEffects, rank_by_effect
from metaopt_lens.interventions._knock_out_runs import KnockOutRuns, RowMetric
from metaopt_lens.interventions._meta_gradient import meta_gradient
from metaopt_lens.interventions._recovery import split_queries
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.prompts import ICLPrompt, PromptLike, as_prompts, tokenize_label
from metaopt_lens.runs import candidate_labels, refuse_acting, tokenize_for

Metric = str | Callable[[Tensor], Tensor]


def head_effects(
    model: Any,
    prompts: PromptLike | Sequence[PromptLike],
    *,
    metric: Metric = "logit_difference",
    per_demo: bool = False,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> HeadEffects:
    """What every head's meta-gradient does to the model's answers.

    A head's effect is the metric of the in-context run minus the metric with this head's demonstrations knocked out at
    every position of the query (docs/theory.md, section 5): exactly, one run per head; and to first order, from one
    backward pass. The demonstrations are run once. To see how many heads make the in-context gain, heads are ranked on
    one half of the queries and added back in that order on the other half, which had no say in the ranking. With a
    single query there is no other half, and how many heads recover the gain is undefined.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: queries behind the same demonstrations, each with its label, in the forms `decompose` takes.
        metric: ``"logit_difference"``, the label's first token against the mean of the other candidates';
            ``"label_log_prob"``, mean log-probability of the label's tokens; ``"loss"``, its negative; or a function
            of the logits that follow the query, ``[d_vocab]``, that gives a number.
        per_demo: also knock out every demonstration in every head (as many runs as heads times demonstrations).
        batch_size: runs made together; by default as many as memory allows.
        seed: of the split into queries to rank heads on and queries to measure the recovery on.

    Raises:
        PromptError: no prompts, different demonstrations, or no label or candidates where the metric needs them.
        ContextWindowError: a prompt is longer than the context window.
    """
    wrapped = wrap(model)
    refuse_acting(wrapped, "head_effects")
    prompts = as_prompts(prompts)
    mg = meta_gradient(wrapped, prompts[0], prepend_bos=prepend_bos)
    for prompt in prompts:
        mg.check_prompt(prompt)
    rows, row_metric = _rows(wrapped, prompts, metric, prepend_bos)
    runs = KnockOutRuns(wrapped, mg, rows, row_metric, batch_size)
    n_layers, n_heads, n_demos = wrapped.info.n_layers, wrapped.info.n_heads, len(mg.demos)
    none, every = (
        torch.zeros(1, n_layers, n_heads, dtype=torch.bool),
        torch.ones(1, n_layers, n_heads, dtype=torch.bool),
    )
    all_demos = torch.ones(1, n_demos, dtype=torch.bool)
    each_demo = torch.eye(n_demos, dtype=torch.bool)
    one_head = _one_each(n_layers, n_heads)
    ends = runs.exact(torch.cat([none, every]), all_demos.expand(2, -1))
    without = runs.exact(one_head, all_demos.expand(len(one_head), -1))
    exact = (ends[0] - without).T.reshape(-1, n_layers, n_heads)
    without_demo = runs.exact(every.expand(n_demos, -1, -1), each_demo)
    estimates = runs.first_order(torch.cat([all_demos, each_demo]))  # variant query layer head
    exact_per_demo = None
    if per_demo:
        heads = one_head.repeat(n_demos, 1, 1)
        demos = each_demo.repeat_interleave(len(one_head), 0)
        changed = ends[0] - runs.exact(heads, demos)
        exact_per_demo = changed.view(n_demos, n_layers, n_heads, -1).permute(3, 1, 2, 0)
    selection, held_out = split_queries(len(rows), seed)
    gain = ends[0] - ends[1]
    order = torch.tensor(
        [ref.layer * n_heads + ref.head for ref in rank_by_effect(exact[selection].mean(0), gain[selection])]
    )
    kept_out = torch.ones(len(order) + 1, len(order), dtype=torch.bool)
    for n in range(len(order)):
        kept_out[n + 1 :, order[n]] = False
    added = torch.empty(len(kept_out), 0, dtype=torch.float64)
    if held_out:
        # variant (layer head) -> variant layer head
        out = kept_out.view(-1, n_layers, n_heads)
        added = runs.exact(out, all_demos.expand(len(kept_out), -1), held_out)
    return HeadEffects(
        model=wrapped.info,
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", "metric"),
        n_demos=n_demos,
        in_context=ends[0],
        zero_shot=ends[1],
        exact=exact,
        first_order=estimates[0],
        demo_exact=(ends[0] - without_demo).T,
        demo_first_order=estimates[1:].permute(1, 2, 3, 0),
        demo_exact_per_head=exact_per_demo,
        held_out=torch.tensor(held_out, dtype=torch.int64),
        selection_order=order,
        added=added.T,
    )


def _one_each(n_layers: int, n_heads: int) -> Bool[Tensor, "variant layer head"]:
    return torch.eye(n_layers * n_heads, dtype=torch.bool).view(-1, n_layers, n_heads)


def _rows(
    model: LensModel, prompts: Sequence[ICLPrompt], metric: Metric, prepend_bos: bool | None
) -> tuple[list[tuple[int, ...]], RowMetric]:
    """Tokens behind the demonstrations, and the metric of their logits."""
    tokens = [tokenize_for(model, p, prepend_bos=prepend_bos, require_demos=True) for p in prompts]
    queries = [t.ids[t.query.start :] for t in tokens]
    if not isinstance(metric, str):
        return queries, lambda logits, query: metric(logits[len(queries[query]) - 1])
    labels = [_label(model, prompt, prompt.label, metric) for prompt in prompts]
    if metric == "logit_difference":
        others = [
            [_label(model, p, word, metric)[0] for word in candidate_labels(p) if word != p.label] for p in prompts
        ]
        for prompt, label, wrong in zip(prompts, labels, others, strict=True):
            if not wrong or label[0] in wrong:
                raise PromptError(
                    f"the logit difference of label {prompt.label!r} needs other candidates with another first token: "
                    "give the prompt candidates, or use metric='label_log_prob'."
                )

        def difference(logits: Tensor, query: int) -> Tensor:
            last = logits[-1]
            return last[labels[query][0]] - last[others[query]].mean()

        return queries, difference
    if metric not in {"label_log_prob", "loss"}:
        raise OptionError(f"metric must be 'logit_difference', 'label_log_prob', 'loss' or a function, got {metric!r}.")
    rows = [query + label[:-1] for query, label in zip(queries, labels, strict=True)]
    for row, t in zip(rows, tokens, strict=True):
        model.check_window(t.query.start + len(row), "the longest prompt with its label")
    sign = 1.0 if metric == "label_log_prob" else -1.0

    def log_prob(logits: Tensor, query: int) -> Tensor:
        label = torch.tensor(labels[query], device=logits.device)
        log_probs = logits[len(queries[query]) - 1 :].log_softmax(-1)
        return sign * log_probs[torch.arange(len(label), device=logits.device), label].mean()

    return rows, log_prob


def _label(model: LensModel, prompt: ICLPrompt, label: str | None, metric: str) -> tuple[int, ...]:
    if label is None:
        raise PromptError(f"metric {metric!r} needs the label of query {prompt.query!r}: ICLPrompt(..., label=...).")
    return tokenize_label(label, prompt.template, model.tokenizer)
