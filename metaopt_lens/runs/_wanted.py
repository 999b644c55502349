"""What is wanted of prompts: one value, from `record` to the last batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.models import Intervention, LensModel
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs._destinations import Position, destinations_of
from metaopt_lens.runs._keep import ATTENTION, Keep
from metaopt_lens.runs._prompt_run import CHANGED, SETTINGS, WITH_DEMOS, Setting


@dataclass(frozen=True, eq=False)
class Wanted:
    """Which runs to make of every prompt, and what to keep of them; see `record`.

    Attributes:
        settings: runs to make.
        update: the change of the model in the finetuned settings.
        position: which token of the query to read.
        keep: what to keep beyond the attention.
        grad: keep the graph.

    Raises:
        OptionError: no settings, an unknown one, or a finetuned one without `update`.
    """

    settings: tuple[Setting, ...]
    update: Intervention | None = None
    position: Position = "last"
    keep: Keep = ATTENTION
    grad: bool = False

    def __post_init__(self) -> None:
        if not self.settings:
            raise OptionError("no settings: name at least one of " + ", ".join(map(repr, SETTINGS)) + ".")
        for setting in self.settings:
            if setting not in SETTINGS:
                raise OptionError(f"settings must be among {', '.join(map(repr, SETTINGS))}, got {setting!r}.")
            if setting in CHANGED and self.update is None:
                raise OptionError(f"setting {setting!r} runs the changed model: give it the update.")

    def check(self, prompts: Sequence[TokenizedPrompt]) -> None:
        """Whether all this can be had of these prompts.

        Args:
            prompts: their tokens.

        Raises:
            PromptError: no demonstrations where a setting needs them.
            SpanError: `position` is not in the query.
        """
        if WITH_DEMOS & set(self.settings) and not all(tokens.demos for tokens in prompts):
            raise PromptError("a prompt has no demonstrations: without them it can only be run with settings=('zs',).")
        for tokens in prompts:
            self.destinations(tokens)

    def destinations(self, tokens: TokenizedPrompt) -> tuple[int, ...]:
        """Positions of a query to read, as indices into the prompt.

        Args:
            tokens: of the prompt.
        """
        return destinations_of(tokens, self.position)

    def changed(self, model: LensModel) -> AbstractContextManager[None]:
        """The model as it is in the finetuned settings.

        Args:
            model: a wrapped model.
        """
        return nullcontext() if self.update is None else model.hooked(self.update.hooks(model))
