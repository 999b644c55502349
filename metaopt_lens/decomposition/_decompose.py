"""decompose(): run a model on a prompt and split every head's output (docs/theory.md, section 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

from metaopt_lens._errors import OptionError
from metaopt_lens._storage import provenance
from metaopt_lens.decomposition._decomposition import Decomposition
from metaopt_lens.decomposition._decomposition_set import DecompositionSet
from metaopt_lens.models import LensModel, MomentumTerm, active_momentum, wrap
from metaopt_lens.prompts import PromptLike, as_prompts, is_single
from metaopt_lens.runs import N_TOP, Keep, Position, Setting, keep_answers, record, refuse_acting, tokenize_all

ZeroShotRuns = Literal["both", "plain", "none"]
_SETTINGS: dict[str, tuple[Setting, ...]] = {
    "both": ("icl", "zs", "zs_matched"),
    "plain": ("icl", "zs"),
    "none": ("icl",),
}


@overload
def decompose(
    model: Any,
    prompt: PromptLike,
    *,
    position: Position = "last",
    zero_shot_runs: ZeroShotRuns = "both",
    prepend_bos: bool | None = None,
    momentum: MomentumTerm | None = None,
    grad: bool = False,
    batch_size: int | None = None,
) -> Decomposition: ...


@overload
def decompose(
    model: Any,
    prompt: Sequence[PromptLike],
    *,
    position: Position = "last",
    zero_shot_runs: ZeroShotRuns = "both",
    prepend_bos: bool | None = None,
    momentum: MomentumTerm | None = None,
    grad: bool = False,
    batch_size: int | None = None,
) -> DecompositionSet: ...


def decompose(
    model: Any,
    prompt: Any,
    *,
    position: Position = "last",
    zero_shot_runs: ZeroShotRuns = "both",
    prepend_bos: bool | None = None,
    momentum: MomentumTerm | None = None,
    grad: bool = False,
    batch_size: int | None = None,
) -> Decomposition | DecompositionSet:
    """Split every attention head's output into its zero-shot part and its in-context meta-gradient part.

    The demonstrations are run once and shared by all queries behind them. Exact softmax form, relaxed linear form
    (arXiv:2212.10559, eq. 7-10) and the effects against real zero-shot runs: see docs/theory.md, section 2.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompt: an `ICLPrompt`, text read by `ICLPrompt.from_string`, or a dict with the keys of the JSON prompt files
            (see `load_prompts`); a list of them (or a dict with "queries") gives a `DecompositionSet`.
            Prompts with the same demonstrations share their pass.
        position: which token of the query to read: ``"last"`` (the one that predicts the label), ``"all"``, or an
            index into the whole prompt (negative counts from its end).
        zero_shot_runs: ``"both"`` also runs the prompt without demonstrations, plainly and position-matched;
            ``"plain"`` only plainly (then indirect and position effect are one number); ``"none"`` neither.
        prepend_bos: put BOS first; None for the model's default (`TokenizedPrompt.bos_note` says which).
        momentum: run with this `MomentumAttention` too. Its part of z is then a third one, and split over the
            demonstrations: `Decomposition.momentum` and `momentum_meta_gradient`. Momentum attention that is on already
            (``with intervene(model, ...)``) is seen by itself.
        grad: keep the graph, so that gradients flow from every part to the model's weights.
        batch_size: queries run together; by default as many as memory allows.

    Returns:
        A `Decomposition`, or a `DecompositionSet` in the order of the prompts.

    Raises:
        PromptError: no demonstrations, an empty piece, no tokenizer, a word the tokenizer does not know.
        ContextWindowError: the prompt is longer than the context window.
        SpanError: `position` is not in the query.
        OptionError: a meta-gradient or a knock-out is applied to the model.
        UnsupportedModelError: the architecture cannot be split, or a hook changes z, so that its parts do not add up
            to it (hooks on queries, keys and values, and weight updates, are fine).
        NonFiniteError: NaN or infinity in the activations; names the first layer.
    """
    if zero_shot_runs not in _SETTINGS:
        raise OptionError(f"zero_shot_runs must be 'both', 'plain' or 'none', got {zero_shot_runs!r}.")
    wrapped = wrap(model)
    refuse_acting(wrapped, "decompose")
    parsed = as_prompts(prompt)
    tokens = tokenize_all(wrapped, parsed, prepend_bos=prepend_bos, require_demos=True)
    keep = Keep(stream=True)
    if position == "last":
        keep = Keep(stream=True, logits=keep_answers(wrapped, parsed), n_top=N_TOP)
    with _momentum_on(wrapped, momentum):
        recorded = record(
            wrapped,
            tokens,
            settings=_SETTINGS[zero_shot_runs],
            position=position,
            keep=keep,
            batch_size=batch_size,
            grad=grad,
        )
    info = provenance() | {"zero_shot_runs": zero_shot_runs}
    results = [
        Decomposition(text, runs, keep_position_axis=position == "all", provenance=info, source=wrapped)
        for text, runs in zip(parsed, recorded, strict=True)
    ]
    return results[0] if is_single(prompt) else DecompositionSet(tuple(results))


@contextmanager
def _momentum_on(model: LensModel, momentum: MomentumTerm | None) -> Iterator[None]:
    if momentum is None:
        yield
        return
    with model.hooked(momentum.hooks(model)):
        active_momentum(model)  # refuses a head that has momentum already
        yield
