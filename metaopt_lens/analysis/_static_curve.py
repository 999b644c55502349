"""What one patch for all queries is worth on queries it was not fitted on, against how many it was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metaopt_lens._errors import OptionError, PromptError
from metaopt_lens.analysis._interval import Interval, mean_interval
from metaopt_lens.analysis._matrices import Factors, effective_rank
from metaopt_lens.analysis._recall import exact_interval
from metaopt_lens.interventions import intervene
from metaopt_lens.models import LensModel, Prefix, Readout, wrap
from metaopt_lens.patches import RIDGE, StaticPatch, WeightPatch, exact_patches, fit_static
from metaopt_lens.prompts import ICLPrompt, PromptLike, TokenizedPrompt, as_prompts, tokenize_label
from metaopt_lens.runs import candidate_labels, check_candidates, run_shared_prefix, tokenize_all

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 16  # queries of one length in one pass


@dataclass(frozen=True, eq=False)
class StaticCurve:
    """Answers to held-out queries: in context, zero-shot, and with static patches fitted on more and more queries.

    Attributes:
        n_fit: how many queries each static patch was fitted on.
        ridge: of all of them.
        in_context: log-probabilities of the next token, in context.
        zero_shot: without demonstrations.
        static: with each static patch.
        correct: whether the right label's first token has the best score among the candidates' first tokens: in
            context, zero-shot, then with each static patch.
        effective_rank: of the last static patch's matrices, by name.
        patch: the last static patch.
        asked: the held-out queries.
    """

    n_fit: tuple[int, ...]
    ridge: float
    in_context: Float[Tensor, "query d_vocab"]
    zero_shot: Float[Tensor, "query d_vocab"]
    static: Float[Tensor, "fit query d_vocab"]
    correct: Bool[Tensor, "setting query"]
    effective_rank: dict[str, Float[Tensor, " layer"]]
    patch: StaticPatch
    asked: tuple[ICLPrompt, ...]

    @property
    def kl_to_in_context(self) -> Float[Tensor, "setting query"]:
        """``KL(in context | setting)`` in nats: zero-shot, then each static patch."""
        return torch.stack([_kl(self.in_context, other) for other in (self.zero_shot, *self.static)])

    @property
    def kl_to_zero_shot(self) -> Float[Tensor, "setting query"]:
        """``KL(zero-shot | setting)`` in nats: in context, then each static patch."""
        return torch.stack([_kl(self.zero_shot, other) for other in (self.in_context, *self.static)])

    @property
    def divergences(self) -> dict[str, Float[Tensor, "setting query"]]:
        """Both divergences of every setting, in the order of `settings`; 0 of a setting from itself."""
        nothing = torch.zeros(1, self.correct.shape[1], dtype=torch.float64)
        to_zero_shot = self.kl_to_zero_shot
        return {
            "kl_to_in_context": torch.cat([nothing, self.kl_to_in_context]),
            "kl_to_zero_shot": torch.cat([to_zero_shot[:1], nothing, to_zero_shot[1:]]),
        }

    @property
    def sentence(self) -> str:
        """Whether the last patch beats zero-shot on these queries, by a t interval of the paired difference."""
        gain = self.correct[-1].double() - self.correct[1].double()
        return gain_sentence(mean_interval(gain).within(-1.0, 1.0), self.n_fit[-1])

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings, in the order of `correct`."""
        return ("in context", "zero-shot", *(f"static patch, {k} queries" for k in self.n_fit))

    def to_frame(self) -> pd.DataFrame:
        """One row for every setting: accuracy with its exact interval, and both divergences with their t intervals."""
        import pandas as pd

        rows = []
        for number, name in enumerate(self.settings):
            right = self.correct[number]
            interval = exact_interval(int(right.sum()), len(right))
            assert interval is not None  # there are queries
            row: dict[str, Any] = {"setting": name, "n": len(right), "accuracy": float(right.double().mean())}
            row |= {"accuracy_low": interval[0] / 100, "accuracy_high": interval[1] / 100}
            for key, kl in self.divergences.items():
                mean = mean_interval(kl[number])
                row |= {key: float(mean.estimate), f"{key}_low": float(mean.low), f"{key}_high": float(mean.high)}
            rows.append(row)
        return pd.DataFrame(rows)


def static_curve(
    model: Any,
    fitted: Sequence[PromptLike],
    held_out: Sequence[PromptLike],
    *,
    n_fit: Sequence[int] | None = None,
    ridge: float = RIDGE,
    patches: Sequence[WeightPatch] | None = None,
    prepend_bos: bool | None = None,
) -> StaticCurve:
    """Fit static patches on the first of some queries, and test them on others (docs/theory.md, section 9).

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model.
        fitted: queries to fit on, behind the same demonstrations.
        held_out: other queries behind them, each with its label.
        n_fit: how many of the first `fitted` each patch is fitted on; by default 2, 4, 8, ... and all.
        ridge: weight of the penalty, relative to the mean square of an input.
        patches: exact patches of `fitted` (`exact_patches`), to compile them once for several ridges.
        prepend_bos: put BOS first; None for the model's default.

    Returns:
        The answers to the held-out queries.

    Raises:
        PromptError: a held-out query without label, one that was fitted, other demonstrations, or patches of other
            queries.
        OptionError: `n_fit` below 2 or above the number of queries.
    """
    wrapped, fit, asked = wrap(model), as_prompts(fitted), as_prompts(held_out)
    counts = _counts(len(fit)) if n_fit is None else tuple(n_fit)
    if not counts or not all(2 <= k <= len(fit) for k in counts):
        raise OptionError(f"n_fit must be from 2 to the {len(fit)} fitting queries, got {list(counts)}.")
    known = {prompt.query for prompt in fit}
    for prompt in asked:
        if prompt.label is None:
            raise PromptError(f"the held-out query {prompt.query!r} needs its label: ICLPrompt(..., label=...).")
        if prompt.query in known:
            raise PromptError(f"the query {prompt.query!r} is fitted on and held out: give other queries.")
    tokens = tokenize_all(wrapped, asked, prepend_bos=prepend_bos, require_demos=True)
    labels = [first_tokens(wrapped, prompt) for prompt in asked]
    if patches is None:
        patches = exact_patches(wrapped, fit, prepend_bos=prepend_bos)
    elif [patch.tokens for patch in patches] != tokenize_all(wrapped, fit, prepend_bos=prepend_bos):
        raise PromptError("the patches are not those of the fitting queries: exact_patches(model, fitted) makes them.")
    prefix = run_shared_prefix(wrapped, tokens[0].ids[: tokens[0].query.start])
    in_context = _next(wrapped, [t.ids[t.query.start :] for t in tokens], prefix)
    zero_shot = zero_shot_answers(wrapped, tokens)
    statics = [fit_static(patches[:k], ridge=ridge) for k in counts]
    answers = []
    for static in statics:
        with intervene(wrapped, static):
            answers.append(zero_shot_answers(wrapped, tokens))
    settings = [in_context, zero_shot, *answers]
    return StaticCurve(
        n_fit=counts,
        ridge=ridge,
        in_context=in_context,
        zero_shot=zero_shot,
        static=torch.stack(answers),
        correct=torch.stack([answered_right(setting, labels) for setting in settings]),
        effective_rank=static_ranks(statics[-1]),
        patch=statics[-1],
        asked=tuple(asked),
    )


def gain_sentence(gain: Interval, n_fit: int) -> str:
    """Whether a static patch beats zero-shot.

    Args:
        gain: in accuracy, paired query by query.
        n_fit: how many queries the patch was fitted on.
    """
    low, high = float(gain.low), float(gain.high)
    text = f"{float(gain.estimate):+.1%} of {gain.n_queries} held-out queries"
    if low != low:  # all units changed alike
        return f"The static patch changes the accuracy by {text}, the same for every {gain.unit}: no interval."
    verdict = "beats" if low > 0 else "does worse than" if high < 0 else "is not shown to beat"
    return (
        f"The static patch fitted on {n_fit} queries {verdict} zero-shot: accuracy {text} "
        f"(95 % interval {low:+.1%} to {high:+.1%}, {gain.label})."
    )


def static_ranks(patch: StaticPatch) -> dict[str, Float[Tensor, " layer"]]:
    """Effective rank of each matrix's change in every layer; see `effective_rank`.

    Args:
        patch: made by `static_patch`.
    """
    found = {}
    for name in patch.matrices:
        changes = [patch.dense(layer, name) for layer in range(patch.model.n_layers)]
        found[name] = torch.stack([effective_rank(Factors(change.A, change.B)) for change in changes])
    return found


def _counts(n: int) -> tuple[int, ...]:
    return (*(2**i for i in range(1, n.bit_length()) if 2**i < n), n)


def first_tokens(model: LensModel, prompt: ICLPrompt) -> list[int]:
    """First tokens of the candidates, the right label's first.

    Args:
        model: a wrapped model.
        prompt: with its label.
    """
    names = [prompt.label or "", *(label for label in candidate_labels(prompt) if label != prompt.label)]
    ids = [tokenize_label(name, prompt.template, model.tokenizer) for name in names]
    check_candidates(ids, names, scoring="first")
    return [label[0] for label in ids]


def _next(
    model: LensModel, queries: Sequence[Sequence[int]], prefix: Prefix | None = None
) -> Float[Tensor, "query d_vocab"]:
    """Log-probabilities of the token that follows each query; those of one length are run together."""
    found: list[Tensor] = [torch.empty(0)] * len(queries)
    for length in {len(query) for query in queries}:
        alike = [number for number, query in enumerate(queries) if len(query) == length]
        for first in range(0, len(alike), _BATCH):
            rows = alike[first : first + _BATCH]
            ids = torch.tensor([list(queries[row]) for row in rows])
            read = Readout(torch.full((len(rows), 1), length - 1))
            logits = model.run(ids, prefix=prefix, read=read)
            assert logits is not None
            for row, own in zip(rows, logits[:, 0].detach().double().log_softmax(-1), strict=True):
                found[row] = own
    return torch.stack(found)


def zero_shot_answers(model: LensModel, tokens: Sequence[TokenizedPrompt]) -> Float[Tensor, "query d_vocab"]:
    """Log-probabilities of the token after each query, without demonstrations.

    Args:
        model: a wrapped model, with whatever is applied to it.
        tokens: of the in-context prompts.
    """
    return _next(model, [t.zero_shot().ids for t in tokens])


def answered_right(
    log_probs: Float[Tensor, "query d_vocab"], labels: Sequence[Sequence[int]]
) -> Bool[Tensor, " query"]:
    """Whether the right label's first token has the best score among the candidates' first tokens.

    Args:
        log_probs: of the next token.
        labels: of each query; see `first_tokens`.
    """
    return torch.tensor([int(row[list(own)].argmax()) == 0 for row, own in zip(log_probs, labels, strict=True)])


def _kl(p: Float[Tensor, "query d_vocab"], q: Float[Tensor, "query d_vocab"]) -> Float[Tensor, " query"]:
    found: Tensor = (p.exp() * (p - q)).sum(-1)
    return found
