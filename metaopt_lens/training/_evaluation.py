"""What a trained model is worth: perplexity by context length, few-shot accuracy by number of demonstrations."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from metaopt_lens._errors import PromptError
from metaopt_lens.models.tiny import accuracy, sample_episodes
from metaopt_lens.prompts import load_prompts
from metaopt_lens.runs import candidate_labels, predict_labels, tokenize_for
from metaopt_lens.training._corpora import Corpus, SyntheticCorpus
from metaopt_lens.training._language_model import LanguageModel
from metaopt_lens.training._training_config import TrainingConfig
from metaopt_lens.training._training_settings import EvaluationSettings


@dataclass(frozen=True)
class Evaluation:
    """Measured on held-out data.

    Attributes:
        perplexity: by length of the context (synthetic: without each category's first label, which nothing tells).
        accuracy: by number of demonstrations, the answer taken among the prompt's candidate labels. Synthetic prompts
            bind categories to labels they never had in training.
        accuracy_of_all: the answer taken among all labels.
        accuracy_seen: like `accuracy`, but with bindings as in training. A model that knows which label a category
            never had does well here and worse than chance there, without following the demonstrations.
    """

    perplexity: dict[int, float]
    accuracy: dict[int, float]
    accuracy_of_all: dict[int, float]
    accuracy_seen: dict[int, float]


def evaluate(lm: LanguageModel, corpus: Corpus, config: TrainingConfig) -> Evaluation:
    """Measure perplexities and accuracies, with the model's momentum on.

    Args:
        lm: the model.
        corpus: the held-out text or tasks.
        config: what is measured: its `evaluation`.
    """
    settings = config.evaluation
    training = lm.weights.training
    lm.model.host.eval()
    lm.weights.eval()
    try:
        with lm.with_momentum(), torch.inference_mode():
            perplexity = {n: _perplexity(lm, corpus, n, settings.n_tokens) for n in settings.context_lengths}
            accuracies = _accuracies(lm, corpus, settings)
    finally:
        lm.weights.train(training)
        lm.model.host.train(training)
    return Evaluation(perplexity, **accuracies)


def _perplexity(lm: LanguageModel, corpus: Corpus, length: int, n_tokens: int) -> float:
    windows = corpus.windows(length, n_tokens)
    size = max(1, 4096 // length)
    total, count = 0.0, 0.0
    for start in range(0, len(windows.tokens), size):
        rows = slice(start, start + size)
        tokens, weights = (t[rows].to(lm.model.device) for t in (windows.tokens, windows.weights))
        log_probs = lm.logits(tokens)[:, :-1].float().log_softmax(-1)
        nll = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
        total, count = total + float((nll * weights).double().sum()), count + float(weights.sum())
    return math.exp(total / count)


def _accuracies(lm: LanguageModel, corpus: Corpus, settings: EvaluationSettings) -> dict[str, dict[int, float]]:
    tables: dict[str, dict[int, float]] = {"accuracy": {}, "accuracy_of_all": {}, "accuracy_seen": {}}
    for n in settings.demos:
        if isinstance(corpus, SyntheticCorpus):
            new = _synthetic(lm, settings, n, held_out=True)
            tables["accuracy"][n], tables["accuracy_of_all"][n] = new["candidates"], new["labels"]
            tables["accuracy_seen"][n] = _synthetic(lm, settings, n, held_out=False)["candidates"]
        elif settings.prompts is not None:
            tables["accuracy"][n] = _from_file(lm, settings.prompts, n, settings.n_episodes)
    return tables


def _synthetic(lm: LanguageModel, settings: EvaluationSettings, n_demos: int, *, held_out: bool) -> dict[str, float]:
    episodes = sample_episodes(
        n=settings.n_episodes, n_demos=n_demos, n_categories=settings.categories, held_out=held_out, seed=1
    )
    return accuracy(lambda ids: lm.logits(ids.to(lm.model.device)).float().cpu(), episodes)


def _from_file(lm: LanguageModel, path: str, n_demos: int, n_prompts: int) -> float:
    right, seen = 0, 0
    for prompt in load_prompts(path)[:n_prompts]:
        if prompt.label is None:
            raise PromptError(f"{path}: few-shot accuracy needs prompts with a label; {prompt.query!r} has none.")
        if len(prompt.demos) < n_demos:
            raise PromptError(
                f"{path}: the prompt {prompt.query!r} has {len(prompt.demos)} demonstrations, not {n_demos}."
            )
        cut = dataclasses.replace(prompt, demos=prompt.demos[:n_demos], candidates=candidate_labels(prompt))
        tokenized = tokenize_for(lm.model, cut)
        right += predict_labels(lm.model, cut, tokenized).in_context_answer == prompt.label
        seen += 1
    return right / seen
