"""The update the context makes and the one gradient descent makes: same matrices, same demonstrations, same units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._errors import NonFiniteError, OptionError, PromptError
from metaopt_lens.analysis._compare_options import Finetuning
from metaopt_lens.analysis._controls import finetune_arguments, shuffle_labels, unrelated_update
from metaopt_lens.analysis._interval import CONDITIONAL, mean_interval
from metaopt_lens.analysis._matrices import Factors, dense_cosine
from metaopt_lens.analysis._null_names import SHUFFLED_LABELS, UNRELATED_TEXT
from metaopt_lens.analysis._own_updates import default_unrelated_texts, finetune_sets
from metaopt_lens.analysis._recall import exact_interval
from metaopt_lens.analysis._static_curve import StaticCurve, answered_right, first_tokens, zero_shot_answers
from metaopt_lens.finetuning import MLP, WeightUpdate, demonstration_ids, finetune
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.patches import StaticPatch
from metaopt_lens.prompts import ICLPrompt
from metaopt_lens.runs import tokenize_all

if TYPE_CHECKING:
    import pandas as pd

FINETUNED = "finetuned"
UPHILL = "uphill"
OTHER_DEMOS = "other demonstrations"


@dataclass(frozen=True, eq=False)
class PatchAgainstFinetuning:
    """A static patch and finetuning on the same demonstrations, of the same matrices.

    The cosines are of one demonstration set and have no interval: the nulls' draws are their scale. Intervals of the
    accuracies are over queries, conditional on these demonstrations. See `PatchesAgainstFinetuning` for several sets.

    Attributes:
        matrices: that both change, as the patch names them: of the MLP, or W_O of an attention-only model.
        cosine: Frobenius cosine of the patch's change and the finetuned one; NaN where one is zero.
        nulls: the same with other updates, made in the way of the finetuned one, by name: ``"shuffled labels"``
            (several draws), ``"uphill"`` (ascent of the same loss), ``"unrelated text"`` (of equal norm), and ``"other
            demonstrations"`` where there are any.
        correct: held-out queries answered rightly, by setting: ``"in context"``, ``"zero-shot"``, ``"static patch"``,
            ``"finetuned"``.
        null_correct: the same with the nulls' updates.
        finetuned: the finetuned changes; what they were made with is in its settings.
        notes: what is left out, and why.
    """

    matrices: tuple[str, ...]
    cosine: Float[Tensor, "layer matrix"]
    nulls: dict[str, Float[Tensor, "draw layer matrix"]]
    correct: dict[str, Bool[Tensor, " query"]]
    null_correct: dict[str, Bool[Tensor, "draw query"]]
    finetuned: WeightUpdate
    notes: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Which of the two buys more accuracy, by a t interval of the paired difference over queries."""
        gain = self.correct["static patch"].double() - self.correct[FINETUNED].double()
        found = mean_interval(gain).within(-1.0, 1.0)
        low, high = float(found.low), float(found.high)
        text = f"The static patch's accuracy less that of finetuning is {float(found.estimate):+.1%}"
        if low != low:  # all queries differ alike
            return f"{text}, the same for all {len(gain)} held-out queries: no interval."
        return f"{text} on {len(gain)} held-out queries (95 % interval {low:+.1%} to {high:+.1%}, {CONDITIONAL})."

    def to_frame(self) -> pd.DataFrame:
        """One row per update, layer and matrix: the mean cosine with the patch's change, and the draws' extremes."""
        import pandas as pd

        rows = []
        for name, draws in {FINETUNED: self.cosine[None], **self.nulls}.items():
            for layer in range(draws.shape[1]):
                for number, matrix in enumerate(self.matrices):
                    values = draws[:, layer, number]
                    row: dict[str, Any] = {"update": name, "layer": layer, "matrix": matrix, "draws": len(values)}
                    row |= {"cosine": float(values.mean()), "lowest": float(values.min())}
                    rows.append(row | {"highest": float(values.max())})
        return pd.DataFrame(rows)

    def accuracy_frame(self) -> pd.DataFrame:
        """One row per setting and draw: accuracy on the held-out queries, with its exact interval."""
        import pandas as pd

        settings = [(name, 0, right) for name, right in self.correct.items()]
        for name, draws in self.null_correct.items():
            settings += [(f"{FINETUNED}, {name}", draw, right) for draw, right in enumerate(draws)]
        rows = []
        for name, draw, right in settings:
            interval = exact_interval(int(right.sum()), len(right))
            assert interval is not None  # there are queries
            row: dict[str, Any] = {"setting": name, "draw": draw, "n": len(right)}
            row |= {"accuracy": float(right.double().mean())}
            rows.append(row | {"accuracy_low": interval[0] / 100, "accuracy_high": interval[1] / 100})
        return pd.DataFrame(rows)


def patch_against_finetuning(
    model: Any,
    curve: StaticCurve,
    update: WeightUpdate | None = None,
    *,
    seeds: Sequence[int] = range(5),
    others: Sequence[WeightUpdate] = (),
    prepend_bos: bool | None = None,
) -> PatchAgainstFinetuning:
    """Compare a static patch with finetuning on the demonstrations it stands for (docs/theory.md, section 9).

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        curve: of `static_curve`; its last patch is compared, on its held-out queries.
        update: ``finetune(model, prompt, projections=("mlp_in", "mlp_gate", "mlp_out"), ...)`` on the demonstrations
            (of an attention-only model, ``projections=("o",)``); made with the defaults of `Finetuning` if not given.
        seeds: of the draws of shuffled labels.
        others: updates made in the same way on other demonstrations, for the null of that name.
        prepend_bos: as for the curve.

    Returns:
        Cosines and accuracies, with their nulls.

    Raises:
        ModelMismatchError: patch or update of another model.
        OptionError: an update that changes none of the patch's matrices, or does not say how it was made; others that
            change other matrices.
        PromptError: an update trained on other data than the demonstrations, or another `prepend_bos` than the curve's.
    """
    wrapped, patch, asked = wrap(model), curve.patch, curve.asked
    wrapped.check_same(patch.model, "this static patch")
    if update is None:
        (update,) = own_updates(wrapped, [curve], prepend_bos=prepend_bos)
    wrapped.check_same(update.model, "this weight update")
    matrices = common_matrices(patch, update)
    arguments = finetune_arguments(update) | {"prepend_bos": prepend_bos, "allow_processed": True, "progress": False}
    tokens = tokenize_all(wrapped, asked, prepend_bos=prepend_bos, require_demos=True)
    if tokens[0].ids[: patch.tokens.stop] != patch.tokens.ids:
        raise PromptError("the patch was fitted with another prepend_bos: give the one that static_curve was given.")
    if update.trained_on is None or sorted(update.trained_on) != sorted(demonstration_ids(tokens[0])):
        raise PromptError(
            "the update was not trained on the patch's demonstrations: give finetune one of the curve's prompts."
        )
    for other in others:
        wrapped.check_same(other.model, "this weight update")
        if common_matrices(patch, other) != matrices:
            raise OptionError(
                f"updates on other demonstrations must change {' and '.join(matrices)}, as the one on the patch's own "
                f"does; this one changes {' and '.join(_changed(other))}: make it with the same projections."
            )
    labels = [first_tokens(wrapped, prompt) for prompt in asked]
    notes: list[str] = []
    only = [name for name in _changed(update) if name not in matrices]
    if only:
        notes.append(f"The update also changes {' and '.join(only)}, which the patch of this model leaves as it is.")

    def right(made: WeightUpdate) -> Bool[Tensor, " query"]:
        with made.applied(wrapped):
            return answered_right(zero_shot_answers(wrapped, tokens), labels)

    # One after the other: an update of all matrices is as large as they are.
    nulls: dict[str, Float[Tensor, "draw layer matrix"]] = {}
    null_correct: dict[str, Bool[Tensor, "draw query"]] = {}
    for name, draws in _null_updates(wrapped, asked[0], update, others, arguments, seeds):
        try:
            found = [(change_cosines(patch, made), right(made)) for made in draws]
        except (PromptError, OptionError, NonFiniteError) as error:
            notes.append(f"the control {name!r} is left out ({error})")
            continue
        nulls[name], null_correct[name] = (torch.stack(list(values)) for values in zip(*found, strict=True))
    if not others:
        notes.append(f"the control {OTHER_DEMOS!r} is left out (it needs a second demonstration set)")
    return PatchAgainstFinetuning(
        matrices=matrices,
        cosine=change_cosines(patch, update),
        nulls=nulls,
        correct={
            "in context": curve.correct[0],
            "zero-shot": curve.correct[1],
            "static patch": curve.correct[-1],
            FINETUNED: right(update),
        },
        null_correct=null_correct,
        finetuned=update,
        notes=tuple(notes),
    )


def change_cosines(patch: StaticPatch, update: WeightUpdate) -> Float[Tensor, "layer matrix"]:
    """Frobenius cosine of the two changes of every layer and of each of the `common_matrices`, in float64.

    Args:
        patch: made by `static_patch`.
        update: of the MLP's matrices; see `finetune`.
    """
    changed, rows = _changed(update), []
    names = common_matrices(patch, update)
    for layer in range(patch.model.n_layers):
        factored = {name: patch.dense(layer, name) for name in names}
        rows.append(
            [dense_cosine(Factors(f.A, f.B), changed[name][layer].to(f.A.device)) for name, f in factored.items()]
        )
    return torch.stack([torch.stack(row) for row in rows]).cpu()


def common_matrices(patch: StaticPatch, update: WeightUpdate) -> tuple[str, ...]:
    """The matrices that both change, as the patch names them.

    Args:
        patch: made by `static_patch`.
        update: made by `finetune`.

    Raises:
        OptionError: there are none.
    """
    changed = _changed(update)
    found = tuple(name for name in patch.matrices if name in changed)
    if not found:
        has = " and ".join(changed) or "no matrix of the MLP, and not W_O"
        wanted = ", ".join(map(repr, _projections(patch)))
        option = f"finetune with projections=({wanted},)" if wanted else "this family has no such comparison"
        raise OptionError(
            f"the update changes {has}, but the patch of {patch.model.name} changes {' and '.join(patch.matrices)}: "
            f"{option}."
        )
    return found


def _changed(update: WeightUpdate) -> dict[str, Float[Tensor, "layer d_out d_in"]]:
    """Changes of the MLP's matrices and of W_O, named as in a patch."""
    prefix = "w_mlp_"
    found = {name.removeprefix(prefix): t for name, t in update.tensors().items() if name.startswith(prefix)}
    if update.w_o is not None:
        found["o"] = update.w_o.flatten(1, 2).mT  # layer head d_head d_model -> layer d_model (head d_head)
    return found


def own_updates(
    model: LensModel, curves: Sequence[StaticCurve], *, prepend_bos: bool | None
) -> tuple[WeightUpdate, ...]:
    """Finetuning of the patch's matrices on every set, at a rate chosen on a quarter of the first set's demonstrations.

    Args:
        model: never modified.
        curves: one for each demonstration set.
        prepend_bos: as for the curves.

    Raises:
        OptionError: matrices that finetuning has no counterpart of.
    """
    patch = curves[0].patch
    projections = _projections(patch)
    if not projections:
        changed = " and ".join(patch.matrices)
        raise OptionError(f"the patch of {patch.model.name} changes {changed}, which finetuning has no counterpart of.")
    how = Finetuning(further={"projections": projections, "bias": False, "keep_factors": False})
    firsts = [curve.asked[0] for curve in curves]
    return finetune_sets(model, firsts, how, prepend_bos=prepend_bos, allow_processed=True).updates


def _projections(patch: StaticPatch) -> list[str]:
    """The patch's matrices as `finetune` names them."""
    return [name if name == "o" else f"mlp_{name}" for name in patch.matrices if name == "o" or f"mlp_{name}" in MLP]


def _null_updates(
    model: LensModel,
    prompt: ICLPrompt,
    update: WeightUpdate,
    others: Sequence[WeightUpdate],
    arguments: dict[str, Any],
    seeds: Sequence[int],
) -> Iterator[tuple[str, Iterator[WeightUpdate]]]:
    """Updates of every null, each made when it is asked for; raises where one cannot be made."""
    options = arguments["optimizer_options"] | {"maximize": True}
    yield SHUFFLED_LABELS, (finetune(model, shuffle_labels(prompt, seed=seed), **arguments) for seed in seeds)
    yield UPHILL, (finetune(model, prompt, **{**arguments, "optimizer_options": options}) for _ in range(1))
    texts = default_unrelated_texts(model, prompt)
    yield UNRELATED_TEXT, (unrelated_update(model, texts, like=update) for _ in range(1))
    if others:
        yield OTHER_DEMOS, iter(others)
