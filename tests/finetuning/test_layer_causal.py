"""Layer-causal gradient descent (LCGD): every layer learns from its own early exit only (docs/theory.md, section 3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import build, shared
from own_parameters import OwnParameters, early_exit_losses, example, layer_causal
from torch import Tensor

from metaopt_lens import MetaoptLensError
from metaopt_lens.finetuning import WeightUpdate, finetune, training_examples
from metaopt_lens.finetuning._losses import batch_tokens, layer_causal_losses
from metaopt_lens.models import wrap

F64 = torch.float64
DEMOS = [("w30 w31", "w32"), ("w34", "w36 w37"), ("w38 w39", "w40")]
EXAMPLES = [example(f"{text} : {label}") for text, label in DEMOS]
NAMES = ["bridge:gpt2", "bridge:llama", "bridge:gemma2", "bridge:gpt_neox"]
try:
    from transformer_lens import HookedTransformer  # noqa: F401

    NAMES += ["hooked:learned", "hooked:rotary"]
except ImportError:  # TransformerLens 4
    pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("readout", ["block", "attention"])
def test_every_step_equals_sgd_on_own_parameters_with_torchs_own_detaching_hooks(name: str, readout: Any) -> None:
    own, model = OwnParameters(name), shared(name, F64)
    base = {p: own.read(p) for p in "qkvo"}
    chosen: Any = ("q", "k", "v", "o")
    losses = own.train([[one] for one in EXAMPLES], lr=0.3, projections=chosen, loss=layer_causal(readout))
    update = finetune(model, DEMOS, lr=0.3, projections=chosen, layer_causal=True, readout=readout, progress=False)
    assert update.losses == pytest.approx(losses, rel=1e-6)
    for layer in range(own.n_layers):
        changes = {p: own.read(p)[layer] - base[p][layer] for p in "qkvo"}  # type: ignore[index]
        norm = sum(float(t.square().sum()) for t in changes.values()) ** 0.5
        assert norm > 1e-2
        for p, change in changes.items():
            assert float((getattr(update, f"w_{p}")[layer] - change).norm()) <= 1e-6 * norm


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layers_first_step_is_ordinary_gradient_descents(name: str) -> None:
    """Nothing is above it, and its early exit is the model's own logits."""
    model = shared(name, F64)
    ordinary, causal = (
        finetune(model, DEMOS[:1], lr=0.3, layer_causal=value, progress=False) for value in (False, True)
    )
    for field, tensor in ordinary.tensors().items():
        last = causal.tensors()[field][-1]
        torch.testing.assert_close(last, tensor[-1], rtol=0, atol=1e-13 * float(tensor[-1].abs().max()) + 1e-15)
    assert (causal.w_v[0] - ordinary.w_v[0]).norm() > 0.1 * ordinary.w_v[0].norm()  # type: ignore[index]


def leaves(model: Any) -> WeightUpdate:
    zero = 0.0 * finetune(model, DEMOS[:1], lr=0.1, projections=("q", "k", "v", "o"), progress=False)
    tensors = {field: t.clone().requires_grad_() for field, t in zero.tensors().items()}
    return WeightUpdate(zero.model, **tensors)


def losses_of(model: Any, update: WeightUpdate, readout: Any) -> Tensor:
    wrapped = wrap(model)
    return layer_causal_losses(wrapped, training_examples(wrapped, DEMOS), update.hooks(wrapped), readout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("readout", ["block", "attention"])
def test_a_layers_loss_has_zero_gradient_for_every_other_layers_update(name: str, readout: Any) -> None:
    model = shared(name, F64)
    update = leaves(model)
    losses = losses_of(model, update, readout)
    assert losses.shape == (3,)
    for layer in range(3):
        gradients = torch.autograd.grad(losses[layer], list(update.tensors().values()), retain_graph=True)
        for field, gradient in zip(update.tensors(), gradients, strict=True):
            others = [i for i in range(3) if i != layer]
            assert not gradient[others].any(), (layer, field)
            # In a block that adds attention and MLP to one stream, the output bias reaches its own early exit too.
            assert field == "b_k" or gradient[layer].abs().max() > 0, (layer, field)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_early_exits_of_each_block_and_the_last_is_the_models_own(name: str) -> None:
    own, model = OwnParameters(name), shared(name, F64)
    wrapped = wrap(model)
    for one, demo in zip(EXAMPLES, DEMOS, strict=True):
        with torch.no_grad():
            found = layer_causal_losses(wrapped, training_examples(wrapped, [demo]), [], "block")
            expected = torch.stack(early_exit_losses(own, one, "block"))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    examples = training_examples(wrapped, DEMOS)
    kept: list[Tensor] = []
    with torch.no_grad():
        logits = wrapped.run(batch_tokens(examples), hooks=[(wrapped.residual_hook("post", 2), kept.append)])
        torch.testing.assert_close(wrapped.early_exit(kept[0]), logits, rtol=0, atol=1e-10)


def test_readouts_are_two_different_things_and_both_learn() -> None:
    model = shared("bridge:gpt2", F64)
    block, attention = (
        finetune(model, DEMOS, lr=0.3, layer_causal=True, readout=readout, epochs=6, progress=False)
        for readout in ("block", "attention")
    )
    assert (block.w_v - attention.w_v).norm() > 0.1 * block.w_v.norm()  # type: ignore[operator,union-attr]
    for update in (block, attention):
        assert update.losses[-1] < update.losses[len(DEMOS) - 1]
        assert "layer-causal SGD" in repr(update)


@pytest.mark.parametrize("readout", ["block", "attention"])
def test_only_one_layers_logits_are_held_at_a_time(readout: Any) -> None:
    """Autograd keeps what the backward pass needs: of all layers' logits never more than of one layer's."""
    model = wrap(shared("bridge:llama"))
    live: list[int] = [0]
    most = 0

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.is_logits = tensor.shape[-2:] == (n_tokens, model.info.d_vocab)
            live[0] += self.is_logits

        def __del__(self) -> None:
            live[0] -= self.is_logits

    def pack(tensor: Tensor) -> Held:
        nonlocal most
        held = Held(tensor)
        most = max(most, live[0])
        return held

    examples = training_examples(model, DEMOS[:1])
    n_layers, n_tokens = model.info.n_layers, len(examples[0].ids) - 1
    finetune(model, DEMOS[:1], lr=0.1, layer_causal=True, readout=readout, progress=False)  # what is tried once
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        losses = layer_causal_losses(model, examples, [], readout)
        assert len(losses) == n_layers == 3
    assert most == 2  # of one layer, by log-softmax and by the loss


def test_a_model_whose_early_exit_is_not_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(build("bridge:gpt2"))
    exit_ = model.early_exit
    monkeypatch.setattr(model, "early_exit", lambda residual, tokens=None: 2.0 * exit_(residual, tokens))
    with pytest.raises(MetaoptLensError, match=r"layer-causal finetuning reads layers out.*misses its own logits by"):
        finetune(model, DEMOS, lr=0.1, layer_causal=True, progress=False)
