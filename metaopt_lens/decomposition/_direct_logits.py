"""Directions in the residual stream that a logit is read in, and what a run's parts write along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens._errors import ModelMismatchError, UnsupportedModelError
from metaopt_lens._types import TokenSpan
from metaopt_lens.decomposition._answer_tokens import Target
from metaopt_lens.decomposition._logit_contributions import LogitContributions
from metaopt_lens.models import LensModel
from metaopt_lens.prompts import read_token
from metaopt_lens.runs import Keep, Row, Run, Stream, momentum_part, run_rows, softmax_parts

# Of the largest term that a logit is made of: rounding of the model's own arithmetic, with room to spare. Several hosts
# norm in float32 whatever the dtype (docs/dev/numerics.md), so float64 is checked to that.
_TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True, eq=False)
class Directions:
    """What a logit (difference) is read along, with all norms held where a run has them; one row per step.

    ``logit = end . final + offset``; what a head adds to z counts along `heads` (its W_O and norm included).

    Attributes:
        final: in the residual stream, the final norm's scale and gain included.
        offset: what final norm and unembedding add.
        scale: the final norm's.
        heads: in d_head, of every head.
        attention_bias: what b_O, and the bias of a norm after attention, add in every layer.
    """

    final: Float[Tensor, "step d_model"]
    offset: Float[Tensor, " step"]
    scale: Float[Tensor, " step"]
    heads: Float[Tensor, "step layer head d_head"]
    attention_bias: Float[Tensor, "step layer"]


def logit_contributions(model: LensModel, run: Run, targets: Sequence[Target]) -> LogitContributions:
    """What every part of a run writes in the targets' directions.

    Args:
        model: a wrapped model.
        run: recorded with ``Keep(stream=True)``; one destination per target.
        targets: of each destination.

    Raises:
        UnsupportedModelError: the contributions do not add up to the model's logit.
    """
    stream = kept_stream(run)
    found = target_directions(model, run, targets)
    parts = softmax_parts(run)
    per_token = _per_token(run, found.heads)
    squeeze = slice(None) if len(targets) > 1 else 0
    momentum = None
    if run.eta is not None:
        momentum = _along(momentum_part(run, TokenSpan(0, run.tokens.n_tokens)), found.heads)[squeeze]
    contributions = LogitContributions(
        answer=tuple(read_token(target.token, model.tokenizer) for target in targets),
        versus=tuple(tuple(read_token(t, model.tokenizer) for t in target.rivals) for target in targets),
        token_ids=tuple((target.token, target.rivals) for target in targets),
        logit=_own_logits(model, stream, targets).to(found.final)[squeeze],
        embedding=_along(stream.start, found.final)[squeeze],
        zero_shot=_along(parts.zero_shot, found.heads)[squeeze],
        meta_gradient=_along(parts.meta_gradient, found.heads)[squeeze],
        momentum=momentum,
        attention_bias=found.attention_bias[squeeze],
        mlp=_along(stream.mlp, found.final[:, None])[squeeze],
        bias=found.offset[squeeze],
        per_demo=torch.stack([per_token[..., demo.slice].sum(-1) for demo in run.tokens.demos], dim=-1)[squeeze],
        per_token=per_token[squeeze],
        scale=found.scale[squeeze],
        softcap=model.head.softcap,
    )
    _require_sum(model, contributions)
    return contributions


def target_directions(model: LensModel, run: Run, targets: Sequence[Target]) -> Directions:
    """Directions of the targets at a run's destinations.

    Args:
        model: a wrapped model.
        run: recorded with ``Keep(stream=True)``.
        targets: one per destination.
    """
    head, end = model.head, kept_stream(run).end
    end = end.to(torch.promote_types(end.dtype, torch.float32))
    w_u, b_u = _like(head.w_u, end), None if head.b_u is None else _like(head.b_u, end)

    def contrast(values: Tensor, target: Target) -> Tensor:
        own = values[..., target.token]
        return own - values[..., list(target.rivals)].mean(-1) if target.rivals else own

    raw = torch.stack([contrast(w_u, target) for target in targets]).to(end)
    offset = torch.zeros_like(raw[:, 0])
    if b_u is not None:
        offset = torch.stack([contrast(b_u, target) for target in targets]).to(end)
    norm = head.fixed_norm
    if norm is None:
        final, scale = raw, torch.ones_like(offset)
    else:
        scale = norm.scale(end)
        final, offset = norm.pulled_back(raw, scale), offset + norm.constant(raw)
    heads, bias = zip(
        *(_head_directions(model, run, layer, final) for layer in range(model.info.n_layers)), strict=True
    )
    return Directions(final, offset, scale, torch.stack(heads, dim=1), torch.stack(bias, dim=1))


def _head_directions(model: LensModel, run: Run, layer: int, final: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's `Directions.heads` and `Directions.attention_bias`."""
    w_o, b_o, norm = _like(model.w_o(layer), final).to(final), model.b_o(layer), model.norm_after_attention(layer)
    bias = torch.zeros_like(final[:, 0])
    direction = final
    if norm is not None:
        written = torch.einsum("thd,hdm->tm", run.z[:, layer].to(final), w_o)
        written = written if b_o is None else written + _like(b_o, final).to(final)
        direction, bias = norm.pulled_back(final, norm.scale(written)), norm.constant(final)
    if b_o is not None:
        bias = bias + direction @ _like(b_o, final).to(final)
    return torch.einsum("hdm,tm->thd", w_o, direction), bias


def _like(weight: Tensor, other: Tensor) -> Tensor:
    return (weight if other.requires_grad else weight.detach()).to(other.device)


def _along(parts: Tensor, directions: Tensor) -> Tensor:
    return (parts.to(directions) * directions).sum(-1)


def _per_token(run: Run, heads: Float[Tensor, "step layer head d_head"]) -> Float[Tensor, "step layer head src"]:
    """Every source's contribution through every head, ``a_i v_i . direction``: no [src, d_model] is built."""
    rows = []
    for layer in range(len(run.own_v)):
        v = run.v_of(layer).to(heads)
        # step (kv_head group) d_head -> step kv_head group d_head
        grouped = heads[:, layer].reshape(len(heads), v.shape[1], -1, v.shape[2])
        along = torch.einsum("ikd,tkgd->tkgi", v, grouped).flatten(1, 2)  # step (kv_head group) src
        rows.append(run.pattern[:, layer].to(heads) * along)
    return torch.stack(rows, dim=1)


def _own_logits(model: LensModel, stream: Stream, targets: Sequence[Target]) -> Tensor:
    """The targets as the host's own norm and unembedding give them."""
    rows = []
    for row, target in enumerate(targets):
        tokens = torch.tensor([target.token, *target.rivals], device=stream.end.device)
        logits = model.head.before_cap(stream.end[row], tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows.append(logits[0] - logits[1:].mean() if target.rivals else logits[0])
    found = torch.stack(rows)
    return found if stream.end.requires_grad else found.detach()


def _require_sum(model: LensModel, found: LogitContributions) -> None:
    error = (found.total - found.logit).abs()
    terms = [found.logit, found.embedding, found.mlp, found.head_total]
    largest = max(float(t.detach().abs().max()) for t in terms)
    worst = float(error.detach().max())
    if not worst <= _TOLERANCE[model.info.dtype] * largest:
        raise UnsupportedModelError(
            f"the contributions in {model.info.name} ({model.info.architecture}) miss its logit by {worst:.3g}: it "
            "writes into the residual stream in a way that is not known here, or a hook or a weight update was on "
            "when the prompt was decomposed. Ask inside the same `with`, or remove it."
        )


def kept_stream(run: Run) -> Stream:
    """The run's residual stream.

    Raises:
        ModelMismatchError: it was not kept, as in results of older versions.
    """
    if run.stream is None:
        raise ModelMismatchError(
            "this result does not hold the residual stream, so its logits are not known: decompose the prompt again."
        )
    return run.stream


# ---- where each token of an answer is predicted ----------------------------------------------------------------------


def at_one_destination(run: Run, dst: int) -> Run:
    """The run at one of its destinations.

    Args:
        run: any run.
        dst: index of the destination; -1 for the last.
    """
    at = slice(dst, dst + 1 or None)
    stream = run.stream
    return replace(
        run,
        destinations=(run.destinations[dst],),
        q=run.q[at],
        z=run.z[at],
        pattern=run.pattern[at],
        sink=run.sink[at],
        stream=None if stream is None else Stream(stream.start[at], stream.end[at], stream.mlp[at]),
        residual=None,
        attention_input=None,
        raw_q=None,
        asked=(),
        logits=None,
        log_normaliser=None,
    )


def run_through_answer(model: LensModel, run: Run, targets: Sequence[Target], *, n_before: int = 0) -> Run:
    """The in-context prompt followed by an answer, read wherever a token of the answer is predicted.

    Args:
        model: a wrapped model, in the state the run was made in.
        run: an in-context run that was read at the prompt's last token.
        targets: the answer's.
        n_before: tokens of the query, before its last, to be read too.

    Raises:
        ModelMismatchError: the model now computes something else on the prompt.
    """
    tokens = run.tokens
    last = tokens.n_tokens - 1
    given = tuple(target.token for target in targets[:-1])
    text = tuple(read_token(token, model.tokenizer) for token in given)
    longer = replace(
        tokens,
        ids=tokens.ids + given,
        tokens=tokens.tokens + text,
        query=TokenSpan(tokens.query.start, tokens.query.stop + len(given)),
    )
    model.check_window(longer.n_tokens, "the prompt with its answer")
    row = Row("icl", longer, tuple(range(last - n_before, longer.n_tokens)))
    (found,) = run_rows(model, run.prefix, [row], keep=Keep(stream=True), grad=run.z.requires_grad)
    before, now = run.z[run.destinations.index(last)], found.z[n_before]
    if not float((now - before).detach().abs().max()) <= _TOLERANCE[model.info.dtype] * float(
        before.detach().abs().max()
    ):
        raise ModelMismatchError(
            "the model computes something else now than when the prompt was decomposed: ask inside the same "
            "`with intervene(...)`, or decompose again."
        )
    return found
