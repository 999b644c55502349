"""What a run's heads write into the residual stream, and its scores before the softmax."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens.dual import ScoreRule, attention_scores
from metaopt_lens.models import LensModel
from metaopt_lens.runs._prompt_run import WITH_DEMOS, Run


def through_w_o(
    model: LensModel, parts: Float[Tensor, "*item layer head d_head"]
) -> Float[Tensor, "*item layer head d_model"]:
    """Parts of z, or differences of z, in the residual stream. The output bias belongs to no head and is left out.

    Args:
        model: a wrapped model, for W_O.
        parts: in d_head; the weights get a graph only if they have one.
    """
    rows = []
    for layer in range(model.info.n_layers):
        weight = model.w_o(layer)
        weight = (weight if parts.requires_grad else weight.detach()).to(parts)
        rows.append(torch.einsum("...hd,hdm->...hm", parts[..., layer, :, :], weight))
    return torch.stack(rows, dim=-3)


def output_bias(model: LensModel, like: Tensor) -> Float[Tensor, "layer d_model"]:
    """b_O of every layer, 0 where there is none.

    Args:
        model: a wrapped model.
        like: gives device, dtype, and whether there is a graph.
    """
    none = torch.zeros(model.info.d_model, device=like.device, dtype=like.dtype)
    biases = [model.b_o(layer) for layer in range(model.info.n_layers)]
    return torch.stack([none if b is None else (b if like.requires_grad else b.detach()).to(like) for b in biases])


def attention_output(
    model: LensModel,
    run: Run,
    *,
    w_o: Float[Tensor, "layer head d_head d_model"] | None = None,
    b_o: Float[Tensor, "layer d_model"] | None = None,
) -> Float[Tensor, "dst layer d_model"]:
    """All heads of every layer together, after W_O and b_O.

    Args:
        model: a wrapped model.
        run: any run.
        w_o: what an update adds to the output projection of the run's model.
        b_o: what an update adds to the output projection of the run's model.
    """
    return all_heads_output(model, run.z, w_o=w_o, b_o=b_o)


def all_heads_output(
    model: LensModel,
    z: Float[Tensor, "*item layer head d_head"],
    *,
    w_o: Float[Tensor, "layer head d_head d_model"] | None = None,
    b_o: Float[Tensor, "layer d_model"] | None = None,
) -> Float[Tensor, "*item layer d_model"]:
    """All heads of every layer together, after W_O and b_O; see `attention_output`.

    Args:
        model: a wrapped model.
        z: head outputs before W_O.
        w_o: what an update adds to the weights of the output projection.
        b_o: what it adds to their biases.
    """
    rows = []
    for layer in range(model.info.n_layers):
        part = z[..., layer, :, :]
        weight = model.w_o(layer).to(part)
        weight = weight if w_o is None else weight + w_o[layer].to(part)
        rows.append(part.flatten(-2) @ weight.flatten(0, 1))  # [*item head * d_head] @ [head * d_head d_model]
    out = torch.stack(rows, dim=-2) + output_bias(model, z)
    return out if b_o is None else out + b_o.to(out)


def own_scores(run: Run) -> Float[Tensor, "dst layer head pos"]:
    """Scores from every destination to the query's own tokens, before the softmax; ``-inf`` for later tokens.

    The metrics of attention maps speak of scores before masking, so a sliding window does not enter.

    Args:
        run: any run.
    """
    query = run.tokens.query
    dst = torch.tensor(run.destinations, device=run.z.device)
    src = torch.arange(query.start, query.stop, device=run.z.device)
    found: list[Tensor] = []
    for _, alike in groupby(range(len(run.own_k)), key=lambda layer: _scoring(run.rules[layer])):
        layers = list(alike)  # one product for all layers that score alike
        rule = replace(run.rules[layers[0]], window=None)
        q, k = run.q[:, layers].transpose(0, 1), run.own_k[layers]
        found += attention_scores(rule, q, k, dst_positions=dst, src_positions=src).unbind()
    return torch.stack(found).permute(2, 0, 1, 3)  # [layer head dst pos] -> [dst layer head pos]


def _scoring(rule: ScoreRule) -> tuple[float, float | None, tuple[float, ...] | None]:
    """What a rule makes of ``q . k``."""
    return rule.scale, rule.softcap, None if rule.alibi_slopes is None else tuple(rule.alibi_slopes.tolist())


def demo_scores(run: Run) -> Float[Tensor, "dst layer head src"]:
    """Scores from every destination to the tokens of all demonstrations, separators left out, without the window.

    Args:
        run: an in-context run.
    """
    assert run.setting in WITH_DEMOS
    pairs = zip(run.tokens.demos, run.tokens.labels, strict=True)
    columns = [i for demo, label in pairs for i in range(demo.start, label.stop)]
    src = torch.tensor(columns, device=run.z.device)
    return torch.stack([_scores(run, layer, run.k_of(layer)[src], src) for layer in range(len(run.own_k))], dim=1)


def _scores(run: Run, layer: int, k: Tensor, src: Int[Tensor, " src"]) -> Float[Tensor, "dst head src"]:
    rule = replace(run.rules[layer], window=None)
    dst = torch.tensor(run.destinations, device=k.device)
    return attention_scores(rule, run.q[:, layer], k, dst_positions=dst, src_positions=src).transpose(0, 1)


def scaled_queries(run: Run) -> Float[Tensor, "dst layer d_q"]:
    """Queries before rotary and QK-norm, times the score scale, heads side by side.

    Args:
        run: recorded with ``Keep(raw_q=True)``.
    """
    assert run.raw_q is not None
    scales = torch.tensor([rule.scale for rule in run.rules], dtype=run.raw_q.dtype, device=run.raw_q.device)
    return (run.raw_q * scales[:, None, None]).flatten(-2)  # dst layer (head d_head)
