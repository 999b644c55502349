"""Finetuning the MLP's matrices by hooks is ordinary finetuning of a copy's own parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOST_NAMES, shared
from own_parameters import OwnParameters, example, layer_causal
from torch import Tensor, nn

from metaopt_lens import ICLPrompt, MetaoptLensError, compare
from metaopt_lens.finetuning import WeightUpdate, finetune
from metaopt_lens.models import wrap

F64 = torch.float64
DEMOS = [("w30 w31", "w32"), ("w34", "w36 w37"), ("w38 w39", "w40")]
EXAMPLES = [example(f"{text} : {label}") for text, label in DEMOS]
QUERY = torch.tensor([[1, 20, 16, 17, 3]])
# As in test_equals_sgd.py: transformers rotates in float32 in some of them (gpt2, llama and gemma2 agree to 1e-9).
# Plain and gated, in sequence and in parallel with the attention, with a norm behind it.
NAMES = ["bridge:gpt2", "bridge:llama", "bridge:gemma2", "bridge:gpt_neox"]
NAMES += ["hooked:learned"] if "hooked:learned" in HOST_NAMES else []


class Own(OwnParameters):
    """Also the MLP's matrices: the copy's parameters with the same numbers as the model's, or their transposes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        model = wrap(shared(name, F64))
        self._found: dict[tuple[int, str], tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = {}
        for layer in range(self.n_layers):
            site = model.mlp_site(layer)
            for key, matrix in {**site.matrices, "out": site.w_out}.items():
                self._found[layer, f"mlp_{key}"] = self._holding(matrix)

    def _holding(self, matrix: Tensor) -> tuple[nn.Parameter, Callable[[Tensor], Tensor]]:
        views: list[Callable[[Tensor], Tensor]] = [lambda t: t, lambda t: t.T]
        matches = [
            (parameter, view)
            for parameter in self.model.parameters()
            for view in views
            if parameter.ndim == 2 and view(parameter).shape == matrix.shape and torch.equal(view(parameter), matrix)
        ]
        (match,) = matches
        return match

    def parameter(self, layer: int, projection: str, kind: str) -> Any:
        if projection.startswith("mlp"):
            return self._found[layer, projection] if kind == "w" else None
        return super().parameter(layer, projection, kind)


def projections(name: str) -> tuple[Any, ...]:
    gate = ("mlp_gate",) if "gate" in wrap(shared(name, F64)).mlp_site(0).matrices else ()
    return ("mlp_in", *gate, "mlp_out")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
def test_every_matrix_moves_as_sgd_moves_the_copys(name: str, causal: bool) -> None:
    own, model, chosen = Own(name), shared(name, F64), ("v", *projections(name))
    base = {p: own.read(p) for p in chosen}
    loss = layer_causal("block") if causal else None
    losses = own.train([[one] for one in EXAMPLES], lr=0.3, projections=chosen, bias=False, loss=loss)
    update = finetune(model, DEMOS, lr=0.3, projections=chosen, bias=False, layer_causal=causal, progress=False)
    assert update.losses == pytest.approx(losses, rel=1e-6)
    assert set(update.tensors()) == {f"w_{p}" for p in chosen}
    for p in chosen:
        change = own.read(p) - base[p]  # type: ignore[operator]
        assert float(change.norm()) > 1e-3
        assert float((getattr(update, f"w_{p}") - change).norm()) <= 1e-6 * float(change.norm())
    with torch.no_grad(), update.applied(model):
        torch.testing.assert_close(model(QUERY)[0], own.logits(QUERY[0].tolist()), rtol=0, atol=1e-6)


def test_such_updates_are_values_like_all_others(tmp_path: Path) -> None:
    model = shared("bridge:llama")
    mlp = finetune(model, DEMOS, lr=0.3, projections=("mlp_in", "mlp_out"), progress=False)
    values = finetune(model, DEMOS, lr=0.3, progress=False)
    both = mlp + values
    assert both.norm() == pytest.approx((mlp.norm() ** 2 + values.norm() ** 2) ** 0.5)
    torch.testing.assert_close(both.layer_norms().square(), mlp.layer_norms().square() + values.layer_norms().square())
    mlp.save(tmp_path / "update")
    loaded = WeightUpdate.load(tmp_path / "update")
    assert loaded.settings == mlp.settings
    assert torch.equal(loaded.w_mlp_out, mlp.w_mlp_out)  # type: ignore[arg-type]
    assert not both.select(["L0H0", "L0H1"]).w_mlp_in.any()  # type: ignore[union-attr]
    frame = both.to_frame()
    inner = frame[frame["projection"] == "mlp_in"]
    assert inner["weight_norm"].tolist() == pytest.approx([float(w.norm()) for w in mlp.w_mlp_in])  # type: ignore[union-attr]
    assert inner["head"].isna().all()
    with torch.no_grad(), both.applied(model), torch.no_grad():
        together = model(QUERY)
    with torch.no_grad(), mlp.applied(model), values.applied(model):
        torch.testing.assert_close(model(QUERY), together)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bridge:gpt2", {"projections": ("mlp_gate",)}, "is not gated: leave 'mlp_gate' out"),
        ("bridge:mixtral", {"projections": ("mlp_in",)}, "the MLP in layer 0 of .* cannot be read"),
        (
            "bridge:llama",
            {"projections": ("mlp_in",), "layer_causal": True, "readout": "attention"},
            "reads a layer out before its MLP",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_before_any_run(name: str, settings: Any, message: str) -> None:
    with pytest.raises(MetaoptLensError, match=message):
        finetune(shared(name), DEMOS, lr=0.3, progress=False, **settings)


def test_comparing_needs_changed_keys_or_values() -> None:
    model = shared("bridge:llama")
    prompts = [ICLPrompt(DEMOS, query, label="w32", candidates=("w32", "w40")) for query in ("w50", "w51")]
    update = finetune(model, prompts[0], lr=0.3, projections=("mlp_in",), progress=False)
    with pytest.raises(MetaoptLensError, match="changes neither keys nor values"):
        compare(model, prompts, update, progress=False)
