"""How much the order of the demonstrations decides: in context, in one pass of SGD, in full-batch descent.

Full-batch gradient descent cannot depend on the order; in-context learning does (after arXiv:2310.08540;
docs/theory.md, section 12).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError
from metaopt_lens._plots import draw
from metaopt_lens._storage import provenance
from metaopt_lens.analysis._ceiling import last_z
from metaopt_lens.analysis._compare_options import Finetuning
from metaopt_lens.analysis._demo_sets import DemoSet, group_sets
from metaopt_lens.analysis._interval import Interval, mean_interval, scope, span_text
from metaopt_lens.analysis._own_updates import finetune_sets
from metaopt_lens.analysis._similarity import rounding_tolerance, rounding_unit
from metaopt_lens.finetuning import finetune, require_raw_weights
from metaopt_lens.models import LensModel, ModelInfo, wrap
from metaopt_lens.prompts import PromptLike, TokenizedPrompt, as_prompts, tokenize_label
from metaopt_lens.runs import Keep, Run, candidate_labels, record, refuse_acting, tokenize_for

if TYPE_CHECKING:
    import pandas as pd

IN_CONTEXT, ONE_PASS, FULL_BATCH = "in context", "one-pass SGD", "full-batch"
LEARNERS = (IN_CONTEXT, ONE_PASS, FULL_BATCH)
_ALL_ORDERS = 6  # demonstrations, up to which all orders are written out to draw from


@dataclass(frozen=True, eq=False, repr=False)
class OrderSpread(Stored):
    """What changes when the same demonstrations come in another order, for each way of learning from them.

    Attributes:
        model: names and sizes.
        updates: by learner, the variance of every head's update over the orders as a share of its mean square: 0 where
            the order decides nothing; NaN where the update is no more than rounding.
        distances: mean total variation distance of the next-token distributions of two orders, with all tokens that
            begin no label word as one.
        changed: share of pairs of orders that answer with different label words.
        sets: the demonstration set of each query.
        orders: of every set, as indices of the demonstrations; the first is the given one.
        rates: learning rates of the one-pass steps, by set; the full-batch step has that times the demonstrations.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "order spread"

    model: ModelInfo
    updates: Mapping[str, Float[Tensor, "query layer head"]]
    distances: Mapping[str, Float[Tensor, " query"]]
    changed: Mapping[str, Float[Tensor, " query"]]
    sets: Int[Tensor, " query"]
    orders: tuple[tuple[tuple[int, ...], ...], ...]
    rates: tuple[float, ...]
    provenance: dict[str, Any] = field(default_factory=provenance)

    @property
    def n_orders(self) -> int:
        """Orders of every set."""
        return len(self.orders[0])

    def spread(self, learner: str = IN_CONTEXT, *, layer: int | None = None) -> Interval:
        """Mean spread of the updates over heads, with its t interval over demonstration sets.

        Args:
            learner: ``"in context"``, ``"one-pass SGD"`` or ``"full-batch"``.
            layer: counted from 0; None for all.

        Raises:
            OptionError: no such learner.
        """
        values = self._of(self.updates, learner)
        found = mean_interval((values if layer is None else values[:, [layer]]).nanmean((1, 2)), sets=self.sets)
        return found.within(0.0, self.n_orders / (self.n_orders - 1))

    def distance(self, learner: str = IN_CONTEXT) -> Interval:
        """Mean distance of predictions, with its t interval.

        Args:
            learner: as for `spread`.

        Raises:
            OptionError: no such learner.
        """
        return mean_interval(self._of(self.distances, learner), sets=self.sets).within(0.0, 1.0)

    def changed_answers(self, learner: str = IN_CONTEXT) -> Interval:
        """Mean share of pairs of orders with different answers, with its t interval.

        Args:
            learner: as for `spread`.

        Raises:
            OptionError: no such learner.
        """
        return mean_interval(self._of(self.changed, learner), sets=self.sets).within(0.0, 1.0)

    def _of(self, values: Mapping[str, Tensor], learner: str) -> Tensor:
        if learner not in values:
            raise OptionError(f"there is no learner {learner!r}: choose one of {', '.join(map(repr, values))}.")
        return values[learner]

    def to_frame(self) -> pd.DataFrame:
        """One row per learner: spread of updates, distance of predictions, changed answers, with intervals."""
        import pandas as pd

        rows = []
        for learner in self.updates:
            row: dict[str, Any] = {"learner": learner}
            for name, found in (
                ("spread", self.spread(learner)),
                ("distance", self.distance(learner)),
                ("changed", self.changed_answers(learner)),
            ):
                row |= {name: float(found.estimate), f"{name}_low": float(found.low), f"{name}_high": float(found.high)}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """A plotly figure: spread of updates and distance of predictions of every learner."""
        return draw(self, "plot")

    def _repr_html_(self) -> str:
        table: str = self.to_frame().to_html(index=False, float_format="{:.3g}".format)
        return table

    def __repr__(self) -> str:
        lines = [
            f"OrderSpread of {self.model.name}: {self.n_orders} orders of the same demonstrations, {len(self.sets)} "
            f"queries, {scope(len(self.orders))} (variance of updates as a share of their mean square; total variation "
            "distance of predictions; changed answers)"
        ]
        for row in self.to_frame().to_dict("records"):
            texts = []
            for name in ("spread", "distance", "changed"):
                low, high = row[f"{name}_low"], row[f"{name}_high"]
                texts.append(f"{name} {row[name]:.3g}" + span_text(low, high, "{:.3g}"))
            lines.append(f"  {row['learner']}: " + ", ".join(texts))
        return "\n".join(lines)


def order_spread(
    model: Any,
    prompts: Sequence[PromptLike],
    *,
    n_orders: int = 5,
    finetuning: Finetuning | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    allow_processed: bool = False,
    batch_size: int | None = None,
) -> OrderSpread:
    """The same demonstrations in several orders, in context, by one pass of SGD and by one full-batch step.

    ``spread = 1/(O - 1) sum_o |u_o - mean u|^2 / (1/O sum_o |u_o|^2)`` with u = z - z^ZS of a head at the last token.
    The full-batch step has the rate of the one-pass steps times the demonstrations, so both are equal to first order.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: queries behind one or several sets of demonstrations.
        n_orders: how many, the given one included; drawn without repeats.
        finetuning: how to finetune; by default one epoch of SGD on keys and values at a rate chosen on the first set.
        seed: of the orders.
        prepend_bos: put BOS first; None for the model's default.
        allow_processed: accept a model with folded norms or biases.
        batch_size: queries run together; by default as many as memory allows.

    Raises:
        OptionError: fewer than two orders, or more than the demonstrations have.
        PromptError: demonstrations without labels to tell answers by, or too few of them to choose a rate.
        ModelMismatchError: processed weights without `allow_processed`.
        NonFiniteError: a finetuning that diverges.
    """
    wrapped, parsed = wrap(model), as_prompts(prompts)
    refuse_acting(wrapped, "order_spread")
    require_raw_weights(wrapped, allow_processed=allow_processed)
    groups = group_sets(wrapped, parsed, prepend_bos=prepend_bos)
    orders = tuple(draw_orders(len(g.prompts[0].demos), n_orders, seed=seed + i) for i, g in enumerate(groups))
    how = finetuning or Finetuning()
    rate = _rate(wrapped, groups[0], how, prepend_bos=prepend_bos, allow_processed=allow_processed)
    sets = torch.zeros(len(parsed), dtype=torch.int64)
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {learner: [] for learner in LEARNERS}
    for number, (group, drawn) in enumerate(zip(groups, orders, strict=True)):
        sets[group.indices] = number
        words = _label_tokens(wrapped, group)
        zero_shot = last_z([r.zs for r in record(wrapped, group.tokenized, settings=("zs",), batch_size=batch_size)])
        for learner in LEARNERS:
            z, answers = [], []
            for order in drawn:
                options: dict[str, Any] = {
                    **how.arguments, "prepend_bos": prepend_bos, "allow_processed": allow_processed, "order": order
                }  # fmt: skip
                runs = _learned(wrapped, group, learner, options, rate, words, batch_size)
                z.append(last_z(runs))
                answers.append(torch.stack([_answer(run) for run in runs]))
            spread = update_spread(torch.stack(z), zero_shot, eps=rounding_unit(wrapped.info.dtype))
            rows[learner].append((spread, *prediction_spread(torch.stack(answers))))
    back = torch.tensor([index for group in groups for index in group.indices]).argsort()
    joined = {
        learner: [torch.cat(column)[back] for column in zip(*found, strict=True)] for learner, found in rows.items()
    }
    updates, distances, changed = ({name: found[i] for name, found in joined.items()} for i in range(3))
    return OrderSpread(wrapped.info, updates, distances, changed, sets, orders, (rate,) * len(groups))


def _rate(
    model: LensModel, group: DemoSet, how: Finetuning, *, prepend_bos: bool | None, allow_processed: bool
) -> float:
    """The learning rate given, or the one that does best on held-out demonstrations of the first set."""
    if not isinstance(how.lr, str):
        return float(how.lr)
    own = finetune_sets(model, group.prompts[:1], how, prepend_bos=prepend_bos, allow_processed=allow_processed)
    assert own.choice is not None
    return own.choice.lr


def draw_orders(n: int, n_orders: int, *, seed: int) -> tuple[tuple[int, ...], ...]:
    """Different orders of n demonstrations, the given one first.

    Args:
        n: demonstrations.
        n_orders: how many orders.
        seed: of the draw.

    Raises:
        OptionError: fewer than two orders, or more than there are.
    """
    if not 2 <= n_orders <= math.factorial(min(n, 20)):
        there = math.factorial(n) if n <= _ALL_ORDERS else f"{n}!"
        what = f"a set of {n} demonstrations has {there} order{'' if n == 1 else 's'}"
        option = "give more demonstrations" if n < 2 else f"ask for 2 to {there}"
        raise OptionError(f"n_orders must be at least 2 and no more than there are, got {n_orders}: {what}, {option}.")
    rng, given = random.Random(seed), tuple(range(n))
    if n <= _ALL_ORDERS:
        others = [order for order in itertools.permutations(range(n)) if order != given]
        return (given, *rng.sample(others, n_orders - 1))
    found = {given: None}  # keeps the order of insertion
    while len(found) < n_orders:
        found[tuple(rng.sample(range(n), n))] = None
    return tuple(found)


def update_spread(
    z: Float[Tensor, "order query layer head d_head"],
    zero_shot: Float[Tensor, "query layer head d_head"],
    *,
    eps: float | None = None,
) -> Float[Tensor, "query layer head"]:
    """Variance of ``z - z^ZS`` over the orders as a share of its mean square; NaN where that is rounding.

    Args:
        z: head outputs after learning in each order.
        zero_shot: without learning.
        eps: rounding unit of the recorded numbers; by default that of their dtype.
    """
    base = zero_shot.double()
    u = z.double() - base
    variance = (u - u.mean(0)).square().sum(-1).sum(0) / (len(u) - 1)
    mean_square = u.square().sum(-1).mean(0)
    tolerance = rounding_tolerance(torch.finfo(z.dtype).eps if eps is None else eps)
    return torch.where(mean_square.sqrt() > tolerance * base.norm(dim=-1), variance / mean_square, torch.nan)


def prediction_spread(
    answers: Float[Tensor, "order query word"],
) -> tuple[Float[Tensor, " query"], Float[Tensor, " query"]]:
    """Mean total variation distance of pairs of orders, and the share of pairs whose best label words differ.

    Args:
        answers: probabilities of the label words and, last, of everything else.
    """
    best = answers[..., :-1].argmax(-1)
    pairs = list(itertools.combinations(range(len(answers)), 2))
    distance = torch.stack([(answers[i] - answers[j]).abs().sum(-1) / 2 for i, j in pairs]).mean(0)
    return distance, torch.stack([(best[i] != best[j]).double() for i, j in pairs]).mean(0)


def _learned(
    model: LensModel,
    group: DemoSet,
    learner: str,
    options: dict[str, Any],
    lr: float,
    words: tuple[int, ...],
    batch_size: int | None,
) -> list[Run]:
    """The queries after learning in one order."""
    keep, order = Keep(logits=words), options["order"]
    if learner == IN_CONTEXT:
        tokens: list[TokenizedPrompt] = []
        for prompt in group.prompts:
            moved = prompt.with_demos([prompt.demos[i] for i in order])
            tokens.append(tokenize_for(model, moved, prepend_bos=options["prepend_bos"], require_demos=True))
        return [r.icl for r in record(model, tokens, settings=("icl",), keep=keep, batch_size=batch_size)]
    whole = learner == FULL_BATCH
    options = {**options, "batch_size": None if whole else 1, "keep_factors": False, "progress": False}
    update = finetune(model, group.prompts[0], lr=lr * len(order) if whole else lr, **options)
    found = record(model, group.tokenized, settings=("ft",), update=update, keep=keep, batch_size=batch_size)
    return [r.ft for r in found]


def _label_tokens(model: LensModel, group: DemoSet) -> tuple[int, ...]:
    """First tokens of the label words of a set's queries, without repeats."""
    words = dict.fromkeys(word for prompt in group.prompts for word in candidate_labels(prompt))
    if not words:
        raise OptionError("there are no label words to tell answers by: give the prompts candidates.")
    template = group.prompts[0].template
    return tuple(dict.fromkeys(tokenize_label(word, template, model.tokenizer)[0] for word in words))


def _answer(run: Run) -> Float[Tensor, " word"]:
    assert run.logits is not None
    assert run.log_normaliser is not None
    known = (run.logits[-1].double() - run.log_normaliser[-1].double()).exp().cpu()
    return torch.cat([known, (1 - known.sum()).clamp_min(0)[None]])
