"""Apply a meta-gradient to a zero-shot run, in any forward pass of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from metaopt_lens._errors import OptionError
from metaopt_lens.interventions._change import Change, Memory, Visibility
from metaopt_lens.interventions._pipeline import Staged
from metaopt_lens.models import HostPass, LensModel

if TYPE_CHECKING:
    from metaopt_lens.interventions._meta_gradient import MetaGradient


@dataclass(frozen=True, eq=False)
class AppliedMetaGradient(Staged):
    """Within ``intervene``, zero-shot tokens stand where they do in context, and chosen heads see the demonstrations.

    Sequences must begin with S (BOS, instruction), as the demonstrations' prompt does. S keeps its positions, all
    that follows is moved behind the demonstrations. Heads that are not chosen attend to the zero-shot prompt alone.

    Attributes:
        form: ``"softmax"``, the exact merge, or ``"linear"``: ``z + strength scale dW_ICL q``.
        scale: of the linear form; None for the layer's score scale over the number of demonstration tokens, the
            first-order factor of a softmax over the demonstrations.
    """

    meta_gradient: MetaGradient
    form: str = "softmax"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.form not in {"softmax", "linear"}:
            raise OptionError(f"form must be 'softmax' or 'linear', got {self.form!r}.")
        if self.form == "softmax" and self.scale is not None:
            raise OptionError("scale belongs to form='linear'; the softmax form takes strength.")

    def change(self, model: LensModel) -> Change:
        """The demonstrations as a memory of the chosen heads.

        Args:
            model: a wrapped model.

        Raises:
            ModelMismatchError: it was made with another model or dtype.
            UnsupportedModelError: the model's tokens cannot be moved to their in-context positions.
        """
        mg = self.meta_gradient
        mg.check_model(model)
        model.check_movable()
        where = mg.tokens.mask(mg.chosen, mg.tokens.stop).nonzero()[:, 0]
        memory = Memory(
            k=mg.k[:, where],
            v=mg.v[:, where],
            positions=where,
            strength=mg.strength,
            linear=self.form == "linear",
            scale=self.scale,
        )

        def place(host_pass: HostPass) -> Int[Tensor, "batch slot"]:
            """S where it is, the rest behind the demonstrations."""
            mg.tokens.check_begins(host_pass, mg.tokens.start, "S, what stands before the demonstrations")
            index = host_pass.index
            positions = torch.where(index >= mg.tokens.start, index + mg.tokens.n_demo_tokens, index)
            model.check_window(int(positions.max()) + 1, "the prompt, moved behind the demonstrations,")
            return positions

        return Change(visibility=Visibility("a meta-gradient", mg.heads, place=place, memory=memory))
