"""A prompt compiled into weights, with everything the command line and the page say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import MetaoptLensError, UnsupportedModelError
from metaopt_lens.analysis import PatchesAgainstFinetuning, StaticCurves, patches_against_finetuning, static_curve
from metaopt_lens.interventions import intervene
from metaopt_lens.models import LensModel, Readout, wrap
from metaopt_lens.patches import RIDGE, ContextShares, WeightPatch, compile_context, context_shares
from metaopt_lens.prompts import ICLPrompt, read_token
from metaopt_lens.runs import TopToken

if TYPE_CHECKING:
    import pandas as pd

# A static patch is fitted on every second query, two or more, and tested on the others.
_FEWEST_QUERIES = 4
_NOTHING_BEFORE = (
    "Nothing stands before the demonstrations, no BOS and no instruction: the first token, which heads attend to for "
    "want of anything else, is a demonstration's in context and the query's own without. The changes make up for that "
    "too, and the first demonstration's share has it."
)


@dataclass(frozen=True, eq=False)
class CompiledPrompt:
    """A context as weights, and what the patched model answers.

    Attributes:
        patch: of the first prompt.
        shares: of heads, demonstrations and tokens; None where they are not defined.
        top: what the model says next: ``"in context"``, ``"patched zero-shot"``, ``"zero-shot"``.
        off: largest difference of a logit from the in-context run, over all tokens of the query: with the patch, and
            without.
        largest: largest logit of the in-context run.
        static: one patch for all queries of each demonstration set, on held-out ones; None where there are too few.
        against: these patches compared with finetuning; None where it was not asked for or is not possible.
        notes: what is not defined, and why.
    """

    patch: WeightPatch
    shares: ContextShares | None
    top: dict[str, tuple[TopToken, ...]]
    off: tuple[float, float]
    largest: float
    static: StaticCurves | None
    against: PatchesAgainstFinetuning | None
    notes: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """How well the patch does what the demonstrations do."""
        patched, plain = self.off
        return (
            f"Over the query's {len(self.patch.query_ids)} tokens, logits of the patched zero-shot prompt are off from "
            f"those in context by {patched:.2g} at most, without the patch by {plain:.2g} (largest logit "
            f"{self.largest:.3g})."
        )

    def norms(self) -> pd.DataFrame:
        """By layer and matrix: norm of the change, relative to the matrix where there is one, mean over tokens."""
        frame = self.patch.to_frame()
        columns = [name for name in ("norm", "relative", "share") if name in frame]
        return frame.groupby(["layer", "matrix"], sort=False)[columns].mean().reset_index()

    def demo_shares(self) -> Float[Tensor, "layer demo"] | None:
        """Each demonstration's share of u, summed over heads, mean over tokens."""
        return None if self.shares is None else self.shares.of_demos.sum(2).mean(1)


def compile_prompts(
    model: Any,
    prompts: Sequence[ICLPrompt],
    *,
    precision: str | None = None,
    ridge: float = RIDGE,
    finetuning: bool = False,
    prepend_bos: bool | None = None,
) -> CompiledPrompt:
    """Compile the first prompt; with four or more queries also fit one patch for all on every second.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
        prompts: one or more queries behind the same demonstrations, or behind each of several sets: they are what
            intervals are over then.
        precision: see `compile_context`.
        ridge: see `static_patch`.
        finetuning: also finetune the same matrices on the demonstrations, and compare; see `patch_against_finetuning`.
        prepend_bos: put BOS first; None for the model's default.

    Returns:
        The patch of the first prompt, and what was measured.
    """
    wrapped, notes = wrap(model), []
    patch = compile_context(wrapped, prompts[0], prepend_bos=prepend_bos, precision=precision)
    if not len(patch.tokens.prefix):
        notes.append(_NOTHING_BEFORE)
    try:
        shares = context_shares(wrapped, patch)
    except UnsupportedModelError as error:
        shares = None
        notes.append(f"No shares: {error}")
    in_context, zero_shot = (_logits(wrapped, ids, patch) for ids in (patch.tokens.ids, patch.zero_shot_ids))
    with intervene(wrapped, patch):
        patched = _logits(wrapped, patch.zero_shot_ids, patch)
    static = _static(wrapped, prompts, notes, prepend_bos=prepend_bos, ridge=ridge)
    against = None
    if finetuning and static is None:
        notes.append("No comparison with finetuning: there is no patch for all queries.")
    elif finetuning and static is not None:
        try:
            against = patches_against_finetuning(wrapped, static.sets, prepend_bos=prepend_bos)
            notes += dict.fromkeys(note for one in against.sets for note in one.notes)
        except MetaoptLensError as error:
            notes.append(f"No comparison with finetuning: {error}")
    return CompiledPrompt(
        patch=patch,
        shares=shares,
        top={
            "in context": _top(wrapped, in_context),
            "patched zero-shot": _top(wrapped, patched),
            "zero-shot": _top(wrapped, zero_shot),
        },
        off=(float((patched - in_context).abs().max()), float((zero_shot - in_context).abs().max())),
        largest=float(in_context.abs().max()),
        static=static,
        against=against,
        notes=tuple(notes),
    )


def _static(
    model: LensModel, prompts: Sequence[ICLPrompt], notes: list[str], *, prepend_bos: bool | None, ridge: float
) -> StaticCurves | None:
    """Static curves of all demonstration sets; why there are none, or fewer, goes to the notes."""
    sets: dict[Any, list[ICLPrompt]] = {}
    for prompt in prompts:
        sets.setdefault((prompt.demos, prompt.instruction, prompt.template), []).append(prompt)
    enough = [queries for queries in sets.values() if len(queries) >= _FEWEST_QUERIES]
    for queries in sets.values():
        if len(queries) < _FEWEST_QUERIES:
            notes.append(
                f"No patch for all queries: it is fitted on every second query and tested on the others, which takes "
                f"{_FEWEST_QUERIES} queries or more; got {len(queries)}."
            )
    n = min(map(len, enough), default=0)
    try:
        curves = [static_curve(model, q[:n:2], q[1:n:2], prepend_bos=prepend_bos, ridge=ridge) for q in enough]
    except MetaoptLensError as error:
        notes.append(f"No patch for all queries: {error}")
        return None
    return StaticCurves(tuple(curves)) if curves else None


def _logits(model: LensModel, ids: Sequence[int], patch: WeightPatch) -> Float[Tensor, "pos d_vocab"]:
    at = torch.arange(len(ids) - len(patch.query_ids), len(ids))[None]
    logits = model.run(torch.tensor([list(ids)]), read=Readout(at))
    assert logits is not None
    return logits[0].detach()


def _top(model: LensModel, logits: Float[Tensor, "pos d_vocab"], n: int = 5) -> tuple[TopToken, ...]:
    best = logits[-1].double().softmax(-1).topk(n)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(TopToken(read_token(token, model.tokenizer), probability) for token, probability in pairs)
