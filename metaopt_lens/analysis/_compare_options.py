"""What `compare` may be told: which controls to run, how to finetune, how to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metaopt_lens._errors import OptionError
from metaopt_lens.analysis._checks import check_positive
from metaopt_lens.analysis._convention import Convention
from metaopt_lens.analysis._demo_sets import Updates
from metaopt_lens.runs import Scoring


@dataclass(frozen=True, eq=False)
class Controls:
    """What the similarity of in-context and finetuning updates is compared with.

    ``"quick"`` runs nothing further: random directions and other queries only. ``"standard"``, the default, adds one
    draw of shuffled labels, flipped labels, and finetuning on unrelated text and uphill: about one more in-context pass
    and four more finetunings a set. One draw is enough, as each set has one of its own and sets are what is averaged
    over. ``"sceptic"`` takes four draws and two copies of the model with permuted weights, which triples the time and
    the memory, and asks the further questions.

    Attributes:
        shuffled_labels: draws of shuffled labels per set, averaged (see `shuffle_labels`); 0 for none.
        flipped_labels: also run the demonstrations with flipped labels (see `flip_labels`).
        unrelated_text: also finetune on sentences that have nothing to do with the task (see `unrelated_update`).
        uphill: also finetune in the same way up the gradient (see `uphill_update`).
        random_weights: also run everything on copies of the model with permuted weights, finetuned in the same way.
        further: also ask what would be possible, which optimiser it looks like, and what order and company of the
            demonstrations do (see `Further`; docs/theory.md, section 12).
        texts: further texts to finetune on, by the name of the control; one list for all sets, or one for each. The
            name ``"unrelated text"`` replaces our own sentences.
        updates: further updates by name, one per set, whose similarity to the in-context update is a null.
        n_null_draws: draws of the random null per query, and at most so many other queries where each costs time.
    """

    shuffled_labels: int = 1
    flipped_labels: bool = True
    unrelated_text: bool = True
    uphill: bool = True
    random_weights: bool = False
    further: bool = False
    texts: Mapping[str, Sequence[str] | Sequence[Sequence[str]]] = field(default_factory=dict)
    updates: Mapping[str, Updates] = field(default_factory=dict)
    n_null_draws: int = 20

    def __post_init__(self) -> None:
        check_positive(n_null_draws=self.n_null_draws)
        if self.shuffled_labels < 0:
            raise OptionError(f"shuffled_labels must be a number of draws, 0 for none, got {self.shuffled_labels}.")

    @staticmethod
    def of(value: Controls | str) -> Controls:
        """The controls of a preset, or those given.

        Args:
            value: ``"quick"``, ``"standard"`` or ``"sceptic"``, or controls.

        Raises:
            OptionError: no such preset.
        """
        if isinstance(value, Controls):
            return value
        if value not in _PRESETS:
            raise OptionError(f"controls must be {', '.join(map(repr, _PRESETS))} or Controls(...), got {value!r}.")
        return _PRESETS[value]


_PRESETS: dict[str, Controls] = {
    "quick": Controls(shuffled_labels=0, flipped_labels=False, unrelated_text=False, uphill=False),
    "standard": Controls(),
    "sceptic": Controls(shuffled_labels=4, random_weights=True, further=True),
}


@dataclass(frozen=True, eq=False)
class Finetuning:
    """How `compare` finetunes on every demonstration set where it is given no updates.

    Attributes:
        lr: learning rate; ``"auto"`` chooses it on a quarter of the first set's demonstrations, held out for that.
        epochs: passes over the demonstrations.
        layer_causal: every layer learns from its own early-exit loss only.
        further: further arguments of `finetune`.
    """

    lr: float | str = "auto"
    epochs: int = 1
    layer_causal: bool = False
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.lr, str) and self.lr != "auto":
            raise OptionError(f"lr must be a number or 'auto', got {self.lr!r}.")

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `finetune`, without the learning rate."""
        return {"epochs": self.epochs, "layer_causal": self.layer_causal, **self.further}


@dataclass(frozen=True)
class Measures:
    """How `compare` measures.

    Attributes:
        subspace_dim: dimension of the singular subspaces.
        top_k: k of the token-level recall (default: 100, or half the tokens of the smallest set if that is less).
        scoring: of candidates, ``"mean"`` log-probability of the label's tokens, or that of the ``"first"`` token.
        convention: the choices in SimAOU, SimAM, Kendall and recall; `Convention.PUBLISHED` for the published code's.
    """

    subspace_dim: int = 4
    top_k: int | None = None
    scoring: Scoring = "mean"
    convention: Convention = Convention.DEFAULT

    def __post_init__(self) -> None:
        check_positive(subspace_dim=self.subspace_dim)
