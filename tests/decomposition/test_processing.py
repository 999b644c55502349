"""Folded weights change the parts and leave `update` alone; the result says which model it was made with."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from families import FAMILIES, HOOKED, has_hooked_transformer
from hosts import HOST_NAMES, build, prompt, requires_hooked, shared
from rounding import assert_agree, of_pass, rounding

from metaopt_lens import Decomposition, decompose, finetune, load_tiny, wrap
from metaopt_lens._errors import ModelMismatchError
from metaopt_lens.models import ProcessedWeightsWarning

PROMPT = prompt()
# No value bias and no LayerNorm bias: nothing to move into b_O, so the parts stay too.
NO_BIASES = {"llama", "llama_mqa", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "mpt"}


def process(name: str) -> Any:
    """Fold everything TransformerLens folds by default, on a model of its own."""
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens's own remarks on what it folds
        if name.startswith("hooked:"):
            model.process_weights_()
        else:
            model.enable_compatibility_mode()
    return model


def folded(name: str) -> Decomposition:
    with pytest.warns(ProcessedWeightsWarning, match=r"parts are those of the folded weights.*no_processing"):
        return decompose(process(name), PROMPT)


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name not in {"bridge:gpt_oss", "bridge:olmo2"}])
def test_update_agrees_and_parts_do_not(name: str) -> None:
    raw, processed = decompose(shared(name), PROMPT), folded(name)
    z = (raw.z, processed.z, raw.softmax.without_demos, processed.softmax.without_demos)
    assert_agree(processed.softmax.update, raw.softmax.update, of_pass(name), of=z)
    assert_agree(processed.effects.direct, raw.effects.direct, of_pass(name), of=z)
    difference = float((processed.softmax.meta_gradient - raw.softmax.meta_gradient).abs().max())
    if name.split(":")[1] in NO_BIASES:
        assert difference <= rounding(of_pass(name), *z)
    else:
        assert difference > 0.1
    assert raw.model.processing == ()
    assert raw.model.is_processed is False
    wanted = {"folded norms", "folded value biases"}
    if name.split(":")[1] in NO_BIASES:
        wanted = {"folded norms"}
    if name == "hooked:no_norm":
        wanted = {"folded value biases"}
    assert set(processed.model.processing) == wanted
    for word in wanted:
        assert word in repr(processed)
    assert "folded" not in repr(raw)


def test_norms_that_nothing_can_be_folded_into_stay_raw() -> None:
    """OLMo-2 normalises behind attention and MLP; TransformerLens leaves these norms, and all but the unembedding."""
    model = process("bridge:olmo2")
    raw = dict(shared("bridge:olmo2").original_model.named_parameters())
    for name, weight in model.original_model.named_parameters():
        assert torch.equal(weight, raw[name]) or "lm_head" in name
    assert wrap(model).info.processing == ()


def test_with_sinks_the_host_itself_computes_something_else() -> None:
    """Rows of a GPT-OSS pattern sum to less than 1, so b_V cannot be moved into b_O: TransformerLens does it anyway."""
    tokens = torch.tensor([[1, 30, 31, 3]])
    raw, processed = shared("bridge:gpt_oss"), process("bridge:gpt_oss")
    with torch.no_grad():
        before, after = (torch.log_softmax(m(tokens), -1) for m in (raw, processed))
    assert (before - after).abs().max() > 1e-2
    with pytest.warns(ProcessedWeightsWarning):
        wrapped = wrap(processed)
    assert wrapped.info.is_processed


@requires_hooked
def test_single_steps_are_told_apart() -> None:
    model = build("hooked:learned")
    model.process_weights_(fold_ln=False)
    with pytest.warns(ProcessedWeightsWarning, match="folded value biases"):
        assert wrap(model).info.processing == ("folded value biases",)
    rotary = build("hooked:rotary")
    with torch.no_grad():
        for block in rotary.blocks:
            block.attn.b_V.zero_()
            block.attn.b_O.zero_()
    assert wrap(rotary).info.processing == ()


def weights_processed_directly(name: str) -> Any:
    """The host's own method, without compatibility mode."""
    model = build(name)
    model.process_weights()
    return model


def norms_folded_by_hand(name: str) -> Any:
    """TransformerLens's own functions on the state dict, which leave no record on the model."""
    from transformer_lens.weight_processing import ProcessWeights

    model = build(name)
    rms = model.cfg.normalization_type == "RMS"
    options = {"fold_biases": not rms, "center_weights": not rms}
    if name.startswith("hooked:"):
        model.load_state_dict(model.fold_layer_norm(model.state_dict(), **options))
        return model
    state = ProcessWeights.fold_layer_norm(model.state_dict(), model.cfg, adapter=model.adapter, **options)
    ProcessWeights.distribute_weights_to_components(state_dict=state, component_mapping=model.real_components)
    return model


BIAS_FREE = ["bridge:llama", "bridge:mistral", "bridge:qwen3", "bridge:gemma", "bridge:gemma3", "native:rotary"]


@pytest.mark.parametrize("name", [*BIAS_FREE, "bridge:gpt2", "bridge:gpt_neox", "native:learned"])
def test_processing_without_compatibility_mode_is_seen(name: str) -> None:
    """0.1 saw it only where value biases were folded: bias-free models were finetuned in folded weights, silently."""
    model = weights_processed_directly(name)
    with pytest.warns(ProcessedWeightsWarning, match="folded norms"):
        assert "folded norms" in wrap(model).info.processing
    with pytest.raises(
        ModelMismatchError,
        match=r"folded norms, which changes what finetuning|folded norms and folded value biases, which",
    ):
        finetune(model, PROMPT, lr=0.1)


@pytest.mark.parametrize(
    "name",
    ["bridge:llama", "bridge:qwen3", "bridge:gpt2", "bridge:gptj", "native:rotary",
     *(f"hooked:{kind}" for kind in ("learned", "rotary", "window_softcap") if has_hooked_transformer())],
)  # fmt: skip
def test_norms_folded_by_hand_are_seen_in_the_weights(name: str) -> None:
    model = norms_folded_by_hand(name)
    tokens = torch.tensor([[1, 30, 31, 3]])
    with torch.no_grad():
        before, after = (torch.log_softmax(m(tokens), -1) for m in (shared(name), model))
    assert_agree(after, before, of_pass(name))
    with pytest.warns(ProcessedWeightsWarning, match="folded norms"):
        assert "folded norms" in wrap(model).info.processing


@pytest.mark.parametrize("name", HOST_NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_gains_of_one_alone_are_not_called_folded(name: str, seed: int) -> None:
    """A fresh initialisation has them too."""
    model = build(name, seed=seed)
    with torch.no_grad():
        for root in (model, getattr(model, "original_model", model)):
            for path, parameter in root.named_parameters():
                if parameter.ndim == 1 and re.search(r"norm|ln", path):
                    gemma = "gemma" in name and path.endswith("weight")
                    parameter.fill_(0.0 if gemma or path.endswith((".bias", ".b")) else 1.0)
    assert wrap(model).info.processing == ()


@requires_hooked
def test_models_trained_by_us_are_not_called_folded() -> None:
    for host in ("bridge", "hooked"):
        assert wrap(load_tiny(host)).info.processing == ()


def test_the_warning_comes_once_per_model() -> None:
    model = process("bridge:gpt2")
    with pytest.warns(ProcessedWeightsWarning):
        decompose(model, PROMPT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decompose(model, PROMPT)


def test_a_saved_result_is_not_given_to_the_other_parametrisation(tmp_path: Any) -> None:
    raw = decompose(shared("bridge:gpt2"), PROMPT)
    raw.save(tmp_path / "raw")
    model = process("bridge:gpt2")
    with (
        pytest.warns(ProcessedWeightsWarning),
        pytest.raises(ModelMismatchError, match=r"processing = \(\)\).*has processing = \('folded norms'"),
    ):
        Decomposition.load(tmp_path / "raw", model=model)
    with pytest.raises(ModelMismatchError, match=r"n_kv_heads = 4\).*has n_kv_heads = 2"):
        Decomposition.load(tmp_path / "raw", model=shared("bridge:llama"))


def test_lists_name_families_that_exist() -> None:
    assert set(FAMILIES) >= NO_BIASES
    assert "no_norm" in HOOKED
