"""Function vectors against hand-made sums of the hosts' own head outputs, and hand-made runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOST_NAMES, build_hf, left_as_it_was, shared, tokenized
from rounding import PASS, assert_agree
from torch import Tensor

from metaopt_lens import ICLPrompt, KnockOut, MetaoptLensError, Template, intervene, wrap
from metaopt_lens.interventions import FunctionVector, function_vector, fwd_hooks, word_pair_prompts

PAIRS = [(f"w{16 + 2 * i} w{17 + i}" if i % 2 else f"w{16 + 2 * i}", f"w{60 + i}") for i in range(8)]
PROMPTS = word_pair_prompts(PAIRS, shots=3, n=5, seed=1)
HEADS = ["L0H1", "L1H3", "L1H0", "L2H2"]
OUT = {"bridge:llama": "model.layers.{}.self_attn.o_proj", "bridge:gpt2": "transformer.h.{}.attn.c_proj"}


def vector_of(name: str, heads: Any = HEADS) -> FunctionVector:
    return function_vector(shared(name), PROMPTS, heads)


@pytest.mark.parametrize("heads", [HEADS, None])
@pytest.mark.parametrize("name", OUT)
def test_it_is_the_sum_of_w_o_times_mean_z(name: str, heads: Any) -> None:
    """z and W_O read from a transformers model that no code of ours touches, one prompt at a time."""
    hf, fv = build_hf(name.split(":")[1]), vector_of(name, heads)
    modules = dict(hf.named_modules())
    expected = torch.zeros(32, dtype=torch.float64)
    for layer in range(3):
        out = modules[OUT[name].format(layer)]
        seen: list[Tensor] = []
        handle = out.register_forward_pre_hook(lambda _module, given, seen=seen: seen.append(given[0][0, -1].detach()))
        with torch.no_grad():
            for prompt in PROMPTS:
                hf(torch.tensor([tokenized(shared(name), prompt).ids]))
        handle.remove()
        mean = torch.stack(seen).double().mean(0)
        chosen = [head for head in range(4) if heads is None or f"L{layer}H{head}" in heads]
        weight = out.weight.detach().double()  # [out, in]; of GPT-2 the other way round
        for head in chosen:
            part = slice(8 * head, 8 * head + 8)
            expected += mean[part] @ weight[part] if "gpt2" in name else weight[:, part] @ mean[part]
    assert (fv.vector.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", HOST_NAMES)
def test_it_is_added_at_the_last_token_behind_its_layer(name: str) -> None:
    model, fv = shared(name), vector_of(name)
    ids = list(tokenized(model, PROMPTS[0]).zero_shot().ids)
    tokens = torch.tensor([ids])

    def add(stream: Tensor, hook: Any) -> Tensor:
        return torch.cat([stream[:, :-1], stream[:, -1:] + 2 * fv.vector.float()], dim=1)

    with torch.no_grad(), left_as_it_was(model):
        expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", add)])
        with intervene(model, fv.at(1, strength=2.0)):
            found = model(tokens)
        hooks = fwd_hooks(model, fv.at(1, strength=2.0), tokens=tokens)
        assert torch.equal(found, model.run_with_hooks(tokens, fwd_hooks=hooks))
        assert_agree(found, expected, 0)
        assert (found - model(tokens))[0, -1].abs().max() > 1e-2
        left = torch.tensor([[0, 0, *ids]]), torch.tensor([[0, 0, *[1] * len(ids)]])
        right = torch.tensor([[*ids, 0, 0]]), torch.tensor([[*[1] * len(ids), 0, 0]])
        if name == "hooked:alibi":
            left = right  # this host gives rows padded on the left other distances
        with intervene(model, fv.at(1, strength=2.0)):
            for (padded, mask), at in ((left, -1 if left is not right else len(ids) - 1), (right, len(ids) - 1)):
                assert_agree(model(padded, attention_mask=mask)[0, at], expected[0, -1], 2 * PASS)


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "bridge:gemma2"])
def test_accuracy_by_layer_is_that_of_single_runs(name: str) -> None:
    model, fv = shared(name), vector_of(name)
    queries = []  # labelled with what some layer answers, so that accuracies differ
    for prompt in PROMPTS:
        ids = tokenized(model, prompt).zero_shot().ids
        with torch.no_grad(), intervene(model, fv.at(1)):
            label = f"w{16 + int(model(torch.tensor([ids]))[0, -1, 16:].argmax())}"  # ids below are no words
        queries.append(ICLPrompt(prompt.demos, prompt.query, prompt.template, label=label))
    frame = fv.accuracy(model, queries, batch_size=2)
    assert list(frame["layer"]) == [0, 1, 2]
    for layer in (None, 0, 1, 2):
        right, log_probs = [], []
        for query in queries:
            tokens = torch.tensor([tokenized(model, query).zero_shot().ids])
            with torch.no_grad():
                if layer is None:
                    logits = model(tokens)[0, -1]
                else:
                    with intervene(model, fv.at(layer)):
                        logits = model(tokens)[0, -1]
            token = int(str(query.label)[1:])
            right.append(float(int(logits.argmax()) == token))
            log_probs.append(float(logits.log_softmax(-1)[token]))
        prefix = "zero_shot_" if layer is None else ""
        row = frame.iloc[layer or 0]
        assert row[f"{prefix}accuracy"] == pytest.approx(sum(right) / len(right))
        assert row[f"{prefix}label_log_prob"] == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-4)
    assert frame["accuracy"][1] > 0
    assert frame["label_log_prob"].nunique() == 3


def test_saved_loaded_and_shown(tmp_path: Path) -> None:
    fv = vector_of("bridge:llama")
    fv.save(tmp_path / "fv")
    loaded = FunctionVector.load(tmp_path / "fv")
    assert torch.equal(loaded.vector, fv.vector)
    assert torch.equal(loaded.heads, fv.heads)
    assert (loaded.model, loaded.n_prompts, loaded.provenance) == (fv.model, 5, fv.provenance)
    assert "L0H1, L1H0, L1H3, L2H2 over 5 prompts, norm" in repr(loaded)


def test_prompts_of_word_pairs() -> None:
    assert len({p.query for p in PROMPTS}) == 5
    for prompt in PROMPTS:
        assert len(prompt.demos) == len(set(prompt.demos)) == 3
        assert (prompt.query, prompt.label) in PAIRS
        assert prompt.query not in {demo.input for demo in prompt.demos}
    assert word_pair_prompts(PAIRS, shots=3, n=5, seed=1) == PROMPTS
    assert word_pair_prompts(PAIRS, shots=3, n=5, seed=2) != PROMPTS
    assert len(word_pair_prompts(PAIRS, shots=7, template=Template(separator=" w5 "))) == 8


def test_refusals() -> None:
    model = shared("bridge:gpt2")
    with pytest.raises(MetaoptLensError, match=r"8 word pairs are not enough rows .* 8 demonstrations and a query"):
        word_pair_prompts(PAIRS)
    with pytest.raises(MetaoptLensError, match=r"8 word pairs are not enough rows .* 9 different queries.*lower shots"):
        word_pair_prompts(PAIRS, shots=2, n=9)
    with pytest.raises(MetaoptLensError, match="at least one demonstration and one prompt"):
        word_pair_prompts(PAIRS, shots=0)
    with pytest.raises(MetaoptLensError, match="no head L3H0"):
        function_vector(model, PROMPTS, ["L3H0"])
    with pytest.raises(MetaoptLensError, match="no demonstration"):
        function_vector(model, [ICLPrompt([], "w16")], HEADS)
    with intervene(model, KnockOut(PROMPTS[0])), pytest.raises(MetaoptLensError, match="Call function_vector outside"):
        function_vector(model, PROMPTS, HEADS)
    fv = vector_of("bridge:gpt2")
    with pytest.raises(MetaoptLensError, match="no layer 3: the model has layers 0 to 2"):
        fv.at(3)
    with pytest.raises(MetaoptLensError, match="needs the label of query 'w16'"):
        fv.accuracy(model, [ICLPrompt(PAIRS[:2], "w16")])
    with pytest.raises(MetaoptLensError, match="n_kv_heads"), intervene(shared("bridge:llama"), fv.at(0)):
        pass
    with pytest.raises(MetaoptLensError, match="n_kv_heads"):
        fv.accuracy(wrap(shared("bridge:llama")), PROMPTS)
