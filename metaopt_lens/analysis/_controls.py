"""Controls of a comparison: shuffled and flipped labels, unrelated finetuning, random weights."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis._nulls import derangement
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.prompts import Demo, ICLPrompt

_EMBEDDING_WORDS = ("embed", "wte", "wpe", "w_e", "w_pos", "w_u", "b_u", "lm_head")


def shuffle_labels(prompt: ICLPrompt, *, seed: int) -> ICLPrompt:
    """The same demonstrations with their labels permuted, uniformly at random (null d).

    Labels keep their place as often as chance has it: with two balanced labels, about half of them do. A permutation
    chosen to move as many as possible would make another consistent task instead (see `flip_labels`).

    Args:
        prompt: left as it is.
        seed: of the permutation.

    Returns:
        The prompt with other demonstrations; its own label stays.

    Raises:
        PromptError: all demonstrations have one label, so no shuffle changes anything.
    """
    labels = [demo.label for demo in prompt.demos]
    if len(set(labels)) < 2:
        raise PromptError("labels cannot be shuffled: all demonstrations have the same one.")
    moved = random.Random(seed).sample(labels, len(labels))
    return prompt.with_demos([Demo(d.input, label) for d, label in zip(prompt.demos, moved, strict=True)])


def flip_labels(prompt: ICLPrompt, *, seed: int) -> ICLPrompt:
    """The same task with its label words exchanged: every word stands for another one throughout.

    Whoever learns from the demonstrations follows the flip; whoever only recognises the task keeps to the old words.

    Args:
        prompt: left as it is.
        seed: of the map of words, drawn uniformly from those that map no word to itself.

    Returns:
        The prompt with flipped demonstrations, and its own label flipped too (None if no demonstration shows it).

    Raises:
        PromptError: all demonstrations have one label, so there is nothing to exchange it with.
    """
    words = list(dict.fromkeys(demo.label for demo in prompt.demos))
    if len(words) < 2:
        raise PromptError("labels cannot be flipped: all demonstrations have the same one.")
    flipped = {word: words[i] for word, i in zip(words, derangement(len(words), seed=seed).tolist(), strict=True)}
    demos = tuple(Demo(d.input, flipped[d.label]) for d in prompt.demos)
    label = flipped.get(prompt.label or "")
    possible = prompt.candidates is None or label in prompt.candidates
    return dataclasses.replace(prompt, demos=demos, label=label if possible else None)


def unrelated_update(model: Any, texts: Sequence[str], *, like: WeightUpdate, progress: bool = False) -> WeightUpdate:
    """Finetune on texts that have nothing to do with the task and scale to the norm of `like` (null e).

    The same settings as `like` are used, and texts are repeated or cut to its number of steps.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        texts: plain texts.
        like: the update whose settings, steps and norm are matched.
        progress: show a progress bar (on a terminal).

    Raises:
        OptionError: `like` does not say how it was made, or the update on `texts` is zero.
    """
    settings = finetune_arguments(like)
    per_step = settings["batch_size"] or len(texts)
    wanted = max(1, len(like.losses) // settings["epochs"]) * per_step
    repeated = [texts[i % len(texts)] for i in range(wanted)]
    settings |= {"loss": "all", "order": "given"}  # texts have no labels, and are not the demonstrations
    update = finetune(model, repeated, allow_processed=True, progress=progress, **settings)
    size = update.norm()
    if size == 0:
        raise OptionError("finetuning on the unrelated texts changed nothing, so it cannot be scaled.")
    return like.norm() / size * update


def uphill_update(
    model: Any, prompt: ICLPrompt, *, like: WeightUpdate, prepend_bos: bool | None = None
) -> WeightUpdate:
    """The same finetuning up the gradient, ``-lr`` in place of ``lr`` (null g; docs/theory.md, section 14).

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompt: whose demonstrations are learned.
        like: the update whose settings are used.
        prepend_bos: put BOS first; None for the model's default.

    Raises:
        OptionError: `like` does not say how it was made.
        NonFiniteError: uphill the learning rate diverges.
    """
    settings = finetune_arguments(like)
    settings["optimizer_options"] = {**settings["optimizer_options"], "maximize": True}
    return finetune(model, prompt, prepend_bos=prepend_bos, allow_processed=True, progress=False, **settings)


def finetune_arguments(update: WeightUpdate) -> dict[str, Any]:
    """The settings of an update as arguments of `finetune`, to make another one in the same way.

    Raises:
        OptionError: the update does not say how it was made, or its optimizer is not of ``torch.optim``.
    """
    settings = update.settings
    if settings is None:
        raise OptionError("this update does not say how it was made (it is a sum): give one made by finetune.")
    optimizer = getattr(torch.optim, settings.optimizer, None)
    if optimizer is None:
        raise OptionError(
            f"the update was made with {settings.optimizer}, which is not in torch.optim to be used again."
        )
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return fields | {"optimizer": optimizer}


def randomized_copy(model: Any, *, seed: int, keep_embeddings: bool = False) -> Any:
    """A copy of the model whose weight matrices have their entries permuted: same scale, nothing learned (null c).

    Norms and biases (one-dimensional parameters) are permuted too; with `keep_embeddings`, token and position
    embeddings and the unembedding stay as they are. Costs the model's memory once more.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        seed: of the permutations.
        keep_embeddings: leave embeddings and unembedding as they are.
    """
    # Some hosts keep tensors of their last pass; with its graph they could not be copied.
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    twin = copy.deepcopy(model, {id(t): t.detach() for t in kept if t.grad_fn is not None})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if keep_embeddings and any(word in name.lower() for word in _EMBEDDING_WORDS):
                continue
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return twin
