"""record_apart(): in-context runs in which no demonstration has seen another one (docs/theory.md, section 12)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens._types import TokenSpan
from metaopt_lens.models import AttentionCall, LensModel, active_momentum
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._destinations import prompt_groups
from metaopt_lens.runs._forward import run_shared_prefix
from metaopt_lens.runs._prompt_run import Run
from metaopt_lens.runs._recording import Prefixes, Recorder
from metaopt_lens.runs._wanted import Wanted


def record_apart(model: LensModel, prompts: Sequence[TokenizedPrompt], *, batch_size: int | None = None) -> list[Run]:
    """The in-context runs with every demonstration reading S and itself alone, in every layer; Q reads them all.

    Tokens stand where they stand in context, so keys, values and patterns can be exchanged with those of the in-context
    runs.

    Args:
        model: a wrapped model. It is not modified.
        prompts: tokens of the prompts.
        batch_size: queries run together; by default as many as memory allows.

    Returns:
        One run per prompt, read at its last token.

    Raises:
        PromptError: a prompt without demonstrations.
        OptionError: momentum attention is on, whose moving average runs through all demonstrations.
        NonFiniteError: NaN or infinity in the activations; names the first layer.
    """
    if not all(tokens.demos for tokens in prompts):
        raise PromptError("a prompt has no demonstrations to be read apart: give at least one.")
    if active_momentum(model) is not None:
        raise OptionError(
            "momentum attention is on, and its moving average runs through all demonstrations: none can be read apart. "
            "Run without it."
        )
    found: dict[int, Run] = {}
    for group in prompt_groups(prompts):
        members = [prompts[i] for i in group]
        first = members[0]
        hooks = [
            hook
            for layer in range(model.info.n_layers)
            for hook in model.attention_hooks(layer, partial(_alone, first.demos))
        ]
        prefix = run_shared_prefix(model, first.ids[: first.query.start], hooks=hooks)
        recorder = Recorder(model, Prefixes(prefix, None), Wanted(("icl",)))
        for chosen, batch in recorder.batches(members, batch_size=batch_size):
            found.update((group[i], runs.icl) for i, runs in zip(chosen, batch, strict=True))
    return [found[index] for index in range(len(prompts))]


def _alone(demos: Sequence[TokenSpan], call: AttentionCall) -> Tensor:
    """z with every demonstration hidden from the others."""
    owner = torch.full((call.k.shape[1],), -1, device=call.k.device)
    for number, span in enumerate(demos):
        owner[span.slice] = number
    dst = owner[call.offset :, None]
    return call.attend((dst >= 0) & (owner >= 0) & (dst != owner))[0]
