"""Prompts whose answers can be told apart by their first token, which next-token measures need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from metaopt_lens.models import LensModel
from metaopt_lens.prompts import ICLPrompt, tokenize_label
from metaopt_lens.runs import candidate_labels


def told_apart(model: LensModel, prompts: Sequence[ICLPrompt]) -> tuple[ICLPrompt, ...]:
    """The prompts, each without the candidates that begin with the same token as its label or an earlier candidate.

    A prompt for which only its label would be left is left out.

    Args:
        model: has the tokenizer.
        prompts: with labels.
    """
    first = {
        (word, prompt.template): tokenize_label(word, prompt.template, model.tokenizer)[0]
        for prompt in prompts
        for word in (str(prompt.label), *candidate_labels(prompt))
    }
    found = []
    for prompt in prompts:
        words = dict[int, str]()
        for word in (str(prompt.label), *candidate_labels(prompt)):
            words.setdefault(first[word, prompt.template], word)
        kept = tuple(word for word in candidate_labels(prompt) if word in words.values())
        if len(kept) > 1:
            found.append(dataclasses.replace(prompt, candidates=kept))
    return tuple(found)
