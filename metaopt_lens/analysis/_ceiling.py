"""The best possible update: could any change of a matrix act like the demonstrations? (docs/theory.md, section 12)

Given the zero-shot pattern a, z is linear in a change of the value projection, ``z(dW_V) - z = (sum_i a_i x_i) dW_V``,
and the attention output is linear in a change of W_O. Ridge regression finds the best such change for some queries;
what it explains of the in-context update on others is what training could reach (after arXiv:2509.22621).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._codec import Stored
from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens._plots import draw
from metaopt_lens._storage import provenance
from metaopt_lens.analysis._compare_options import Finetuning
from metaopt_lens.analysis._demo_sets import TrainedSet, Updates, group_sets, with_updates
from metaopt_lens.analysis._held_out import (
    N_FOLDS,
    Explained,
    check_folds,
    explained,
    held_out_mean,
    held_out_predictions,
    held_out_scale,
    join_explained,
    reordered,
)
from metaopt_lens.analysis._interval import Interval, scope, span_text
from metaopt_lens.analysis._own_updates import finetune_sets
from metaopt_lens.analysis._similarity import difference, rounding_unit
from metaopt_lens.dual import at_least_float32
from metaopt_lens.finetuning import WeightUpdate, require_raw_weights
from metaopt_lens.models import LensModel, ModelInfo, wrap
from metaopt_lens.patches import exact_patches
from metaopt_lens.prompts import PromptLike, as_prompts
from metaopt_lens.runs import (
    Run,
    all_heads_output,
    batches,
    choose_batch_size,
    linear_parts,
    record,
    refuse_acting,
    through_w_o,
)

if TYPE_CHECKING:
    import pandas as pd

CEILING = "best update"
CONSTANT = "one constant vector"
FINETUNED = "finetuning"
SCALED = "finetuning, scaled"
FIRST_ORDER = "finetuning's own change of this matrix"
LINEAR = "dW_ICL q, scaled"

TARGETS = ("value", "output", "mlp")


@dataclass(frozen=True, eq=False, repr=False)
class Ceiling(Stored):
    """Held-out R^2 and cosine with the in-context update: of finetuning, of dW_ICL q, and of the best possible change.

    Attributes:
        model: names and sizes.
        targets: by what is changed: ``"value"`` per key-value group (its heads share the change), ``"output"`` (W_O)
            per layer, ``"mlp in"`` and the like per layer.
        sets: the demonstration set of each query.
        n_folds: of the cross-validation, over the queries behind the same demonstrations.
        provenance: versions and time.
    """

    kind: ClassVar[str] = "ceiling"

    model: ModelInfo
    targets: Mapping[str, Explained]
    sets: Int[Tensor, " query"]
    n_folds: int
    provenance: dict[str, Any] = field(default_factory=provenance)

    def __getitem__(self, target: str) -> Explained:
        if target not in self.targets:
            raise OptionError(f"there is no target {target!r}: choose one of {', '.join(map(repr, self.targets))}.")
        return self.targets[target]

    @property
    def n_sets(self) -> int:
        """Demonstration sets."""
        return len(set(self.sets.tolist()))

    def r_squared(self, predictor: str = CEILING, target: str = "value", *, layer: int | None = None) -> Interval:
        """Mean held-out R^2 over key-value groups (or layers), with its t interval over demonstration sets.

        Args:
            predictor: a name of the table.
            target: what is changed.
            layer: counted from 0; None for all.

        Raises:
            OptionError: no such predictor or target.
        """
        return self[target].interval(predictor, self.sets, layer=layer)

    def to_frame(self, *, by_layer: bool = False) -> pd.DataFrame:
        """One row per target and predictor: R^2 and cosine with their intervals, and R^2 as a share of the ceiling's.

        Args:
            by_layer: one row for each layer as well.
        """
        import pandas as pd

        rows = []
        for target, item in self.targets.items():
            for layer in range(self.model.n_layers) if by_layer else (None,):
                top = float(item.interval(CEILING, self.sets, layer=layer).estimate)
                for name in item.errors:
                    r, c = (f(name, self.sets, layer=layer) for f in (item.interval, item.cosine))
                    row: dict[str, Any] = {"target": target, **({} if layer is None else {"layer": layer})}
                    row |= {"update": name, "r_squared": float(r.estimate), "low": float(r.low), "high": float(r.high)}
                    row |= {"of_ceiling": float(r.estimate) / top if top > 0 else float("nan")}
                    row |= {"cosine": float(c.estimate), "cosine_low": float(c.low), "cosine_high": float(c.high)}
                    rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """A plotly figure: held-out R^2 of every update on one line from zero to the ceiling."""
        return draw(self, "plot")

    def _repr_html_(self) -> str:
        table: str = self.to_frame().to_html(index=False, float_format="{:.3f}".format)
        return table

    def __repr__(self) -> str:
        lines = [
            f"Ceiling of {self.model.name}: held-out R^2 of the in-context update, {len(self.sets)} queries in "
            f"{self.n_folds} folds, {scope(self.n_sets)}"
        ]
        table = self.to_frame()
        for target in self.targets:
            lines.append(f"  {target}:")
            for row in table[table["target"] == target].to_dict("records"):
                span = span_text(row["low"], row["high"])
                lines.append(f"    {row['update']}: {row['r_squared']:.3f}{span}, cosine {row['cosine']:+.3f}")
        return "\n".join(lines)


def ceiling(
    model: Any,
    prompts: Sequence[PromptLike],
    update: Updates | None = None,
    *,
    targets: Sequence[str] = ("value", "output"),
    finetuning: Finetuning | None = None,
    n_folds: int = N_FOLDS,
    prepend_bos: bool | None = None,
    allow_processed: bool = False,
    batch_size: int | None = None,
) -> Ceiling:
    """How much of the in-context update any change of a matrix could make, and how much finetuning does.

    For every key-value group ``dW_V = argmin sum_k |(z^ICL - z^ZS)_k - xbar_k dW|^2 + lambda |dW|^2`` with ``xbar =
    sum_i a_i x_i`` over the zero-shot prompt, heads of the group as rows; with a bias where the model has one. For W_O
    the inputs are the heads' zero-shot outputs and the target is the change of the attention output; for the MLP,
    inputs and targets of the exact patches (section 9). All at the last token. lambda is chosen within the fitting
    queries.

    Args:
        model: `HookedTransformer`, `TransformerBridge` or a wrapped model. It is not modified.
        prompts: queries, at least `n_folds` behind each set of demonstrations.
        update: what finetuning did, one per demonstration set; made with `finetuning` if not given.
        targets: what is changed: ``"value"``, ``"output"``, ``"mlp"``.
        finetuning: how to finetune without `update`; by default one epoch of SGD on keys and values.
        n_folds: of the cross-validation.
        prepend_bos: put BOS first; None for the model's default.
        allow_processed: accept a model with folded norms or biases.
        batch_size: queries run together; by default as many as memory allows.

    Raises:
        PromptError: too few queries behind a set of demonstrations; says how many are needed.
        OptionError: an unknown target, fewer than three folds, another number of updates than of sets.
        ModelMismatchError: processed weights, or an update of another model or of other demonstrations.
        UnsupportedModelError: ``"mlp"`` of a mixture of experts.
    """
    wrapped, parsed = wrap(model), as_prompts(prompts)
    refuse_acting(wrapped, "ceiling")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise OptionError(f"targets must be among {', '.join(map(repr, TARGETS))}, got {list(targets)}.")
    require_raw_weights(wrapped, allow_processed=allow_processed)
    groups = group_sets(wrapped, parsed, prepend_bos=prepend_bos)
    check_folds(n_folds, (len(g.indices) for g in groups), what="queries behind every demonstration set")
    if update is None:
        firsts = [group.prompts[0] for group in groups]
        how = finetuning or Finetuning()
        own = finetune_sets(wrapped, firsts, how, prepend_bos=prepend_bos, allow_processed=allow_processed).updates
    else:
        own = (update,) if isinstance(update, WeightUpdate) else tuple(update)
    sets = with_updates(wrapped, groups, own, {}, allow_other_training=False)
    parts: list[dict[str, Explained]] = []
    numbers = torch.zeros(len(parsed), dtype=torch.int64)
    for number, group in enumerate(sets):
        numbers[group.indices] = number
        folds = torch.arange(len(group.indices)) % n_folds
        parts.append(_of_set(wrapped, group, targets, folds, prepend_bos=prepend_bos, batch_size=batch_size))
    order = torch.tensor([index for group in sets for index in group.indices]).argsort()
    joined = {name: reordered(join_explained(part[name] for part in parts), order) for name in parts[0]}
    return Ceiling(wrapped.info, joined, numbers, n_folds)


def _of_set(
    model: LensModel,
    group: TrainedSet,
    targets: Sequence[str],
    folds: Int[Tensor, " query"],
    *,
    prepend_bos: bool | None,
    batch_size: int | None,
) -> dict[str, Explained]:
    found: dict[str, Explained] = {}
    if "value" in targets or "output" in targets:
        runs = record(model, group.tokenized, settings=("icl", "zs", "ft"), update=group.update, batch_size=batch_size)
        icl, zs, ft = ([r[setting] for r in runs] for setting in ("icl", "zs", "ft"))
        if "value" in targets:
            found["value"] = value_ceiling(
                last_z(icl),
                last_z(zs),
                last_z(ft),
                torch.stack([linear_parts(run).meta_gradient[-1].double().cpu() for run in icl]),
                attended_inputs(model, zs),
                folds,
                n_kv_heads=model.info.n_kv_heads,
                change=group.update,
                eps=rounding_unit(model.info.dtype),
            )
        if "output" in targets:
            found["output"] = _of_output(model, group.update, icl, zs, ft, folds)
    if "mlp" in targets:
        found |= _of_mlp(model, group, folds, prepend_bos=prepend_bos)
    return found


def value_ceiling(
    icl: Float[Tensor, "query layer head d_head"],
    zs: Float[Tensor, "query layer head d_head"],
    ft: Float[Tensor, "query layer head d_head"],
    linear: Float[Tensor, "query layer head d_head"],
    inputs: Float[Tensor, "query layer head d_in"],
    folds: Int[Tensor, " query"],
    *,
    n_kv_heads: int,
    change: WeightUpdate | None = None,
    eps: float | None = None,
) -> Explained:
    """How well every predictor does for the update of z behind one demonstration set, per key-value group.

    Args:
        icl: head outputs in context.
        zs: zero-shot.
        ft: zero-shot, finetuned.
        linear: ``dW_ICL q``.
        inputs: ``sum_i a_i x_i`` of the zero-shot run, with ``sum_i a_i`` behind it where there is a bias.
        folds: of the queries.
        n_kv_heads: heads that share a key-value head share the change.
        change: what finetuning did, for the first order of its change of values.
        eps: rounding unit of the recorded numbers.
    """
    defined = ~difference(icl, zs, eps=eps).isnan().any(-1)  # query layer head
    x, start, end, tuned, form = (
        rearrange(t.double(), "query layer (kv group) d -> layer kv query group d", kv=n_kv_heads)
        for t in (inputs, zs, icl, ft, linear)
    )
    target, step = end - start, tuned - start
    predictions = {
        CONSTANT: held_out_mean(target.flatten(-2)[..., None, :], folds),  # layer kv query 1 (group d)
        FINETUNED: step,
        SCALED: _scaled(step, target, folds),
        LINEAR: _scaled(form, target, folds),
    }
    if change is not None and change.w_v is not None:
        weight = change.w_v.double().cpu()
        if change.b_v is not None and x.shape[-1] > weight.shape[-2]:
            weight = torch.cat([weight, change.b_v.double().cpu()[..., None, :]], dim=-2)
        predictions[FIRST_ORDER] = x[..., : weight.shape[-2]] @ weight[:, :, None]
    predictions[CEILING] = held_out_predictions(x, target, folds)
    of_groups = rearrange(defined, "query layer (kv group) -> query layer kv group", kv=n_kv_heads).any(-1)
    return explained(_site(target), {name: _site(t) for name, t in predictions.items()}, of_groups)


def _site(t: Float[Tensor, "layer kv_head query group d"]) -> Float[Tensor, "query layer kv_head out"]:
    """The heads of a group side by side."""
    return rearrange(t, "layer kv query group d -> query layer kv (group d)")


def _scaled(direction: Tensor, target: Tensor, folds: Tensor) -> Tensor:
    """The direction, ``[layer, kv_head, query, group, d]``, with one scale for every group."""
    made = held_out_scale(direction.flatten(-2)[..., None, :], target.flatten(-2), folds)
    return made[..., None, :]  # layer kv query 1 (group d)


def attended_inputs(model: LensModel, runs: Sequence[Run]) -> Float[Tensor, "query layer head d_in"]:
    """``sum_i a_i x_i`` with the attention inputs x_i, and ``sum_i a_i`` where values have a bias, at the last token.

    Args:
        model: a wrapped model, as it was in these runs.
        runs: zero-shot, or any others whose tokens see each other as the model itself lets them.
    """
    info = model.info
    has_bias = all(model.has_bias("v", layer) for layer in range(info.n_layers))
    longest = max(run.tokens.n_tokens for run in runs)
    found: dict[int, Tensor] = {}

    def run_batch(chosen: list[int]) -> list[None]:
        ids = torch.zeros(len(chosen), max(runs[i].tokens.n_tokens for i in chosen), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, : runs[i].tokens.n_tokens] = torch.tensor(runs[i].tokens.ids)
        seen: dict[int, list[Tensor]] = {i: [] for i in chosen}

        def keep(layer: int, x: Tensor) -> None:
            for row, i in enumerate(chosen):
                pattern = at_least_float32(runs[i].pattern[-1, layer])  # head src
                own = pattern @ at_least_float32(x[row, : pattern.shape[-1]]).to(pattern)
                mass = pattern.sum(-1, keepdim=True)
                seen[i].append((torch.cat([own, mass], dim=-1) if has_bias else own).detach().cpu())

        hooks = [model.attention_input_hook(i, partial(keep, i)) for i in range(info.n_layers)]
        model.run(ids, hooks=hooks, stop_after_attention=True)
        found.update({i: torch.stack(rows) for i, rows in seen.items()})
        return [None] * len(chosen)

    size = choose_batch_size(model, n_new=longest, n_prefix=0)
    for _ in batches(range(len(runs)), lambda i: runs[i].tokens.n_tokens, run_batch, batch_size=size):
        pass
    return torch.stack([found[i] for i in range(len(runs))])


def last_z(runs: Sequence[Run]) -> Float[Tensor, "query layer head d_head"]:
    """Head outputs at the last token, on the CPU, in float32 at least.

    Args:
        runs: of the queries.
    """
    return torch.stack([at_least_float32(run.z[-1].detach()).cpu() for run in runs])


def _of_output(
    model: LensModel,
    update: WeightUpdate,
    icl: Sequence[Run],
    zs: Sequence[Run],
    ft: Sequence[Run],
    folds: Int[Tensor, " query"],
) -> Explained:
    """The same for a change of W_O (and b_O), in the residual stream; every layer is one site."""
    z = {name: last_z(runs) for name, runs in (("icl", icl), ("zs", zs), ("ft", ft))}
    out = {name: all_heads_output(model, z[name])[:, :, None] for name in ("icl", "zs")}
    out["ft"] = all_heads_output(model, z["ft"], w_o=update.w_o, b_o=update.b_o)[:, :, None]
    out = {name: t.detach().cpu() for name, t in out.items()}
    linear = torch.stack([linear_parts(run).meta_gradient[-1].detach().cpu() for run in icl])
    inputs = z["zs"].flatten(2)[:, :, None]  # query layer 1 (head d_head)
    if all(model.has_bias("o", layer) for layer in range(model.info.n_layers)):
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
    return value_ceiling(
        out["icl"],
        out["zs"],
        out["ft"],
        through_w_o(model, linear).sum(2, keepdim=True).detach().cpu(),
        inputs,
        folds,
        n_kv_heads=1,
        eps=rounding_unit(model.info.dtype),
    )


def _of_mlp(
    model: LensModel, group: TrainedSet, folds: Int[Tensor, " query"], *, prepend_bos: bool | None
) -> dict[str, Explained]:
    """The same for the MLP's matrices: inputs and targets of the exact patches (section 9)."""
    patches = exact_patches(model, group.prompts, prepend_bos=prepend_bos)
    if patches[0].experts is not None:
        raise UnsupportedModelError(
            f"{model.info.name} is a mixture of experts: every token changes experts of its own, and there is no one "
            "change for all. Leave 'mlp' out of the targets."
        )
    found = {}
    for name in patches[0].left:
        factors = [patch.right[_side(name)] for patch in patches]
        right = torch.stack([f[:, -1].double().cpu() for f in factors], dim=1)  # layer query d_in
        inputs = right / right.square().sum(-1, keepdim=True)  # x = r / |r|^2, as r = x / |x|^2
        target = torch.stack([patch.left[name][:, -1].double().cpu() for patch in patches], dim=1)
        predictions = {CONSTANT: held_out_mean(target[:, :, None], folds)}
        change = group.update.tensors().get(f"w_mlp_{name}")
        if change is not None:
            step = torch.einsum("lqi,loi->lqo", inputs, change.double().cpu())
            predictions[FIRST_ORDER] = step[:, :, None]
            predictions[SCALED] = held_out_scale(step[:, :, None], target, folds)[:, :, None]
        predictions[CEILING] = held_out_predictions(inputs[:, :, None], target[:, :, None], folds)
        # layer query 1 d: a layer is a group of one
        sites = {key: _site(value[:, None]) for key, value in predictions.items()}
        found[f"mlp {name}"] = explained(_site(target[:, None, :, None]), sites)
    return found


def _side(matrix: str) -> str:
    return "out" if matrix in ("out", "o") else "in"
