"""The questions of docs/theory.md, section 12, put to the prompts of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from metaopt_lens._errors import MetaoptLensError
from metaopt_lens.analysis._algebra import DemonstrationAlgebra, demonstration_algebra
from metaopt_lens.analysis._ceiling import Ceiling, ceiling
from metaopt_lens.analysis._compare_options import Finetuning
from metaopt_lens.analysis._controls import finetune_arguments
from metaopt_lens.analysis._demo_sets import DemoSet
from metaopt_lens.analysis._held_out import N_FOLDS, join_explained
from metaopt_lens.analysis._ladder import OptimiserLadder, optimiser_ladder
from metaopt_lens.analysis._order import OrderSpread, order_spread
from metaopt_lens.finetuning import WeightUpdate
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import Demo, ICLPrompt
from metaopt_lens.runs import tokenize_for

_Found = TypeVar("_Found", Ceiling, OptimiserLadder, OrderSpread, DemonstrationAlgebra)

# Another task, of our own.
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("young", "old"),
    ("dark", "light"),
    ("high", "low"),
    ("hard", "soft"),
    ("open", "closed"),
)
_N_ORDERS = 4


@dataclass(frozen=True, eq=False)
class Further:
    """Results on a comparison's prompts; None where one could not be had.

    Attributes:
        ceiling: of changes of values and of W_O, next to the compared finetuning.
        ladder: of optimisers.
        order: of the demonstrations.
        algebra: of demonstrations alone and in company. The other task is word pairs of opposite meaning; where the
            tokenizer does not know them, the demonstrations' inputs, each labelled with the next one's.
    """

    ceiling: Ceiling | None
    ladder: OptimiserLadder | None
    order: OrderSpread | None
    algebra: DemonstrationAlgebra | None


def run_further(
    model: LensModel,
    prompts: Sequence[ICLPrompt],
    groups: Sequence[DemoSet],
    updates: Sequence[WeightUpdate],
    *,
    prepend_bos: bool | None,
    allow_processed: bool,
    batch_size: int | None,
    seed: int,
) -> tuple[Further, list[str]]:
    """Everything there is to be had, with a note for what is not.

    Args:
        model: never modified.
        prompts: all queries.
        groups: the demonstration sets.
        updates: what finetuning did, one per set.
        prepend_bos: put BOS first; None for the model's default.
        allow_processed: accept a model with folded norms or biases.
        batch_size: queries run together; by default as many as memory allows.
        seed: of the orders.
    """
    notes: list[str] = []
    options: dict[str, Any] = {"prepend_bos": prepend_bos, "batch_size": batch_size}
    folds = min(N_FOLDS, *(len(group.indices) for group in groups))

    def try_to(what: str, make: Callable[[], _Found]) -> _Found | None:
        try:
            return dataclasses.replace(make(), provenance={})  # the comparison's own is enough
        except MetaoptLensError as error:
            notes.append(f"the {what} is left out ({error})")
            return None

    def ordered() -> OrderSpread:
        arguments = finetune_arguments(updates[0])
        how = Finetuning(
            lr=arguments.pop("lr"), epochs=arguments.pop("epochs"), layer_causal=arguments.pop("layer_causal"),
            further=arguments,
        )  # fmt: skip
        n_demos = min(len(group.prompts[0].demos) for group in groups)
        n_orders = 2 if n_demos < 3 else _N_ORDERS
        return order_spread(
            model, prompts, n_orders=n_orders, finetuning=how, seed=seed, allow_processed=allow_processed, **options
        )

    other = _other_task(model, prompts[0])
    found = Further(
        ceiling=try_to(
            "best possible update",
            lambda: ceiling(model, prompts, updates, n_folds=folds, allow_processed=allow_processed, **options),
        ),
        ladder=try_to("ladder of optimisers", lambda: optimiser_ladder(model, prompts, n_folds=folds, **options)),
        order=try_to("spread over orders", ordered),
        algebra=try_to(
            "demonstration algebra",
            lambda: demonstration_algebra(model, prompts, other=other, n_folds=folds, **options),
        ),
    )
    return found, notes


def _other_task(model: LensModel, prompt: ICLPrompt) -> tuple[Demo | tuple[str, str], ...]:
    """Our own word pairs; where the tokenizer does not know them, the demonstrations' inputs, each labelled with the
    next one's."""
    try:
        tokenize_for(model, prompt.with_demos(OPPOSITES), check_window=False)
    except MetaoptLensError:
        inputs = [demo.input for demo in prompt.demos]
        return tuple(zip(inputs, [*inputs[1:], inputs[0]], strict=True))
    return OPPOSITES


def join_further(parts: Sequence[Further | None]) -> Further | None:
    """The same over all demonstration sets of several comparisons, in order; what not every one has is left out.

    Args:
        parts: of each comparison.
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None

    def join(found: Sequence[Any], how: Callable[[Sequence[Any], Tensor], Any]) -> Any:
        return None if any(one is None for one in found) else how(found, _joined_sets([one.sets for one in found]))

    return Further(
        ceiling=join([part.ceiling for part in known], _join_ceilings),
        ladder=join([part.ladder for part in known], _join_ladders),
        order=join([part.order for part in known], _join_orders),
        algebra=join([part.algebra for part in known], _join_algebras),
    )


def _joined_sets(parts: Sequence[Int[Tensor, " _"]]) -> Int[Tensor, " query"]:
    counts = torch.tensor([0, *(int(sets.max()) + 1 for sets in parts)]).cumsum(0)
    return torch.cat([sets + offset for sets, offset in zip(parts, counts[:-1], strict=True)])


def _join_ceilings(parts: Sequence[Ceiling], sets: Tensor) -> Ceiling:
    shared = [name for name in parts[0].targets if all(name in part.targets for part in parts)]
    targets = {name: join_explained(part.targets[name] for part in parts) for name in shared}
    return dataclasses.replace(parts[0], targets=targets, sets=sets, n_folds=min(part.n_folds for part in parts))


def _join_ladders(parts: Sequence[OptimiserLadder], sets: Tensor) -> OptimiserLadder:
    return dataclasses.replace(
        parts[0],
        explained=join_explained(part.explained for part in parts),
        sets=sets,
        left_out="sets" if all(part.left_out == "sets" for part in parts) else "queries",
        n_folds=min(part.n_folds for part in parts),
    )


def _join_orders(parts: Sequence[OrderSpread], sets: Tensor) -> OrderSpread:
    def joined(which: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(part, which)[name] for part in parts]) for name in parts[0].updates}

    return dataclasses.replace(
        parts[0],
        updates=joined("updates"),
        distances=joined("distances"),
        changed=joined("changed"),
        sets=sets,
        orders=tuple(order for part in parts for order in part.orders),
        rates=tuple(rate for part in parts for rate in part.rates),
    )


def _join_algebras(parts: Sequence[DemonstrationAlgebra], sets: Tensor) -> DemonstrationAlgebra:
    names = parts[0].components
    return dataclasses.replace(
        parts[0],
        size=torch.cat([part.size for part in parts]),
        squares=torch.cat([part.squares for part in parts]),
        components={name: torch.cat([part.components[name] for part in parts]) for name in names},
        additivity=join_explained(part.additivity for part in parts),
        sets=sets,
        n_folds=min(part.n_folds for part in parts),
    )
