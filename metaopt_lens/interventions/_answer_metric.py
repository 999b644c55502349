"""What `head_effects` measures of an answer: a number from the logits at the positions that predict it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, TokenizedPrompt, tokenize_label
from metaopt_lens.runs import candidate_labels

Metric = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AnswerMetric:
    """A number for each of some queries.

    Attributes:
        name: of the metric.
        rows: token ids of each query, followed by the label's tokens that are fed.
        positions: of each row, those whose logits count.
        tokens: ids whose logits count; None for the whole vocabulary.
        value: the number, from these logits of a row, ``[position, token]``, and the query's number.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]
    positions: tuple[Int[Tensor, " _chosen"], ...]
    tokens: Int[Tensor, " token"] | None
    value: Callable[[Tensor, int], Tensor]


def answer_metric(
    model: LensModel, prompts: Sequence[ICLPrompt], tokens: Sequence[TokenizedPrompt], metric: Metric
) -> AnswerMetric:
    """The metric that `head_effects` names.

    Args:
        model: a wrapped model.
        prompts: the queries as text.
        tokens: the same as token ids.
        metric: see `head_effects`.

    Raises:
        OptionError: an unknown metric.
        PromptError: no label, or no candidates, where the metric needs them.
        ContextWindowError: a prompt with its label does not fit.
    """
    if not isinstance(metric, str):
        return _own(metric, tokens)
    if metric not in {"logit_difference", "label_log_prob", "loss"}:
        raise OptionError(f"metric must be 'logit_difference', 'label_log_prob', 'loss' or a function, got {metric!r}.")
    labels = [_label(model, prompt, prompt.label, metric) for prompt in prompts]
    if metric == "logit_difference":
        return _difference(model, prompts, tokens, labels)
    return _log_prob(model, tokens, labels, metric)


def _own(metric: Callable[[Tensor], Tensor], tokens: Sequence[TokenizedPrompt]) -> AnswerMetric:
    rows = _queries(tokens)
    name = getattr(metric, "__name__", "metric")
    return AnswerMetric(name, rows, _last(rows), None, lambda logits, _: metric(logits[-1]))


def _difference(
    model: LensModel,
    prompts: Sequence[ICLPrompt],
    tokens: Sequence[TokenizedPrompt],
    labels: Sequence[tuple[int, ...]],
) -> AnswerMetric:
    """The label's first token against the mean of the other candidates'."""
    others = []
    for prompt, label in zip(prompts, labels, strict=True):
        words = [word for word in candidate_labels(prompt) if word != prompt.label]
        wrong = [_label(model, prompt, word, "logit_difference")[0] for word in words]
        if not wrong or label[0] in wrong:
            raise PromptError(
                f"the logit difference of label {prompt.label!r} needs other candidates with another first token: "
                "give the prompt candidates, or use metric='label_log_prob'."
            )
        others.append(wrong)
    chosen = sorted({label[0] for label in labels} | {token for wrong in others for token in wrong})
    right = [chosen.index(label[0]) for label in labels]
    against = [[chosen.index(token) for token in wrong] for wrong in others]
    rows = _queries(tokens)

    def value(logits: Tensor, query: int) -> Tensor:
        return logits[-1, right[query]] - logits[-1, against[query]].mean()

    return AnswerMetric("logit_difference", rows, _last(rows), torch.tensor(chosen), value)


def _log_prob(
    model: LensModel, tokens: Sequence[TokenizedPrompt], labels: Sequence[tuple[int, ...]], metric: str
) -> AnswerMetric:
    """Mean log-probability of the label's tokens, or its negative."""
    queries = _queries(tokens)
    rows = tuple(query + label[:-1] for query, label in zip(queries, labels, strict=True))
    for row, text in zip(rows, tokens, strict=True):
        model.check_window(text.query.start + len(row), "the longest prompt with its label")
    positions = tuple(torch.arange(len(query) - 1, len(row)) for query, row in zip(queries, rows, strict=True))
    sign = 1.0 if metric == "label_log_prob" else -1.0

    def value(logits: Tensor, query: int) -> Tensor:
        label = torch.tensor(labels[query], device=logits.device)
        return sign * logits.log_softmax(-1)[torch.arange(len(label), device=logits.device), label].mean()

    return AnswerMetric(metric, rows, positions, None, value)


def _queries(tokens: Sequence[TokenizedPrompt]) -> tuple[tuple[int, ...], ...]:
    return tuple(text.ids[text.query.start :] for text in tokens)


def _last(rows: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([len(row) - 1]) for row in rows)


def _label(model: LensModel, prompt: ICLPrompt, label: str | None, metric: str) -> tuple[int, ...]:
    if label is None:
        raise PromptError(f"metric {metric!r} needs the label of query {prompt.query!r}: ICLPrompt(..., label=...).")
    return tokenize_label(label, prompt.template, model.tokenizer)
