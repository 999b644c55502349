"""Folded weights change the parts and leave `update` alone; the result says which model it was made with."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import FAMILIES, HOOKED
from hosts import HOST_NAMES, build, prompt, requires_hooked, shared
from rounding import assert_agree, of_pass, rounding

from metaopt_lens import Decomposition, decompose, wrap
from metaopt_lens._errors import ModelMismatchError
from metaopt_lens.models import ProcessedWeightsWarning

PROMPT = prompt()
# No value bias and no LayerNorm bias: nothing to move into b_O, so the parts stay too.
NO_BIASES = {"llama", "llama_mqa", "mistral", "qwen3", "olmo2", "gemma", "gemma2", "gemma3", "mixtral"}


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


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name != "bridge:gpt_oss"])
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
