"""What the heads of a pretrained model say: contributions against plain transformers, and which heads write answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import Plain

import metaopt_lens as ml
from metaopt_lens import ICLPrompt
from metaopt_lens.analysis import attention_scores_of_heads, contribution_intervals
from metaopt_lens.decomposition import LogitContributionSet
from metaopt_lens.prompts import ContextPrompt

KNOWN = ["France:Paris", "Japan:Tokyo", "Italy:Rome", "Egypt:Cairo", "Spain:Madrid", "Russia:Moscow", "Greece:Athens"]
KNOWN += ["Cuba:Havana"]
ASKED = ["Germany:Berlin", "England:London", "China:Beijing", "Austria:Vienna", "Iran:Tehran", "Peru:Lima"]
ASKED += ["Kenya:Nairobi", "Poland:Warsaw", "Portugal:Lisbon", "Ireland:Dublin"]

VILLAGE = (
    "The village of Harrow Bridge lies in a narrow valley between two hills. Its old mill was built in 1712 and stands "
    "on the bank of the Orla. Farmers from the whole valley used to bring their grain there in autumn.\n\n"
    "Every summer the village holds a fair on the market square. Musicians come from the coast and stay for a week. "
    "The oldest inn, the Red Heron, serves a soup of nettles and smoked trout."
)
OLD_MILL = 1  # the sentence that names the river


@pytest.fixture(scope="module")
def capitals(bridge: Any) -> LogitContributionSet:
    """Ten countries behind eight demonstrations: the lines of the README."""
    pairs = [tuple(pair.split(":")) for pair in KNOWN]
    prompts = [ml.ICLPrompt(pairs, pair.split(":")[0], label=pair.split(":")[1]) for pair in ASKED]
    return ml.decompose(bridge, prompts).logits()


def test_heads_that_write_the_capital_are_found(name: str, capitals: LogitContributionSet) -> None:
    """On SmolLM2 the heads write the answer by reading the query, not the demonstrations, and two stand out."""
    if name != "smollm2":
        pytest.skip("these heads are SmolLM2's")
    zero_shot, meta_gradient = (part.sum((1, 2)).mean() for part in (capitals.zero_shot, capitals.meta_gradient))
    assert float(zero_shot) > 3
    assert float(zero_shot) > 3 * abs(float(meta_gradient))
    strongest = [str(head) for head in capitals.heads(3, part="zero_shot")]
    assert {"L23H4", "L29H1"} <= set(strongest)
    table = contribution_intervals(capitals).set_index(["name", "part"])
    row = table.loc[("L23H4", "zero_shot")]
    assert row["low"] > 1
    assert row["unit"] == "query"  # one demonstration set: the interval speaks about it alone


def test_contributions_sum_to_the_logits_of_plain_transformers(
    plain: Plain, bridge: Any, prompt: ICLPrompt, capitals: LogitContributionSet
) -> None:
    result = ml.decompose(bridge, prompt)
    logits = plain.logits(result.tokenized.ids)[-1]
    right, wrong = (bridge.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in prompt.candidates)
    found = result.logits()
    assert abs(float(found.total - (logits[right] - logits[wrong]))) <= 1e-4 * float(logits.abs().max())
    for item in capitals:
        assert abs(float(item.total - item.logit)) <= 1e-4 * float(logits.abs().max())


def test_heads_contribute_what_plain_transformers_says(plain: Plain, bridge: Any, prompt: ICLPrompt) -> None:
    """z of every head from o_proj's input, through o_proj, the norm after attention if there is one, and the final
    norm, their scales taken from transformers' own activations."""
    result = ml.decompose(bridge, prompt)
    found, ids = result.logits(), result.tokenized.ids
    seen = plain.attention(ids)
    ends: list[torch.Tensor] = []
    outs: list[torch.Tensor] = []
    handles = [plain.model.model.norm.register_forward_pre_hook(lambda _, x: ends.append(x[0][0, -1]))]
    for layer in plain.layers:
        handles.append(layer.self_attn.o_proj.register_forward_hook(lambda _, __, y: outs.append(y[0, -1])))
    plain.logits(ids)
    for handle in handles:
        handle.remove()
    gemma = "gemma" in plain.model.config.model_type
    eps = plain.model.config.rms_norm_eps

    def gain(norm: Any) -> torch.Tensor:
        return norm.weight.detach() + (1.0 if gemma else 0.0)

    w_u = plain.model.lm_head.weight.detach()
    right, wrong = (bridge.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in prompt.candidates)
    direction = (w_u[right] - w_u[wrong]) * gain(plain.model.model.norm) / (ends[0].square().mean() + eps).sqrt()
    largest = float(found.head_total.abs().max())
    for index, layer in enumerate(plain.layers):
        before = direction
        if gemma:
            scale = (outs[index].square().mean() + eps).sqrt()
            before = direction * gain(layer.post_attention_layernorm) / scale
        w_o = layer.self_attn.o_proj.weight.detach().unflatten(1, (plain.n_heads, -1))
        along = torch.einsum("mhd,m->hd", w_o, before)
        heads = (seen.z[index, -1] * along).sum(-1)
        torch.testing.assert_close(found.head_total[index], heads, rtol=0, atol=1e-3 * largest)
        inside = result.demonstrations.slice
        read = torch.einsum("hs,shd,hd->h", seen.pattern[index, :, -1, inside], seen.v[index, inside], along)
        torch.testing.assert_close(found.meta_gradient[index], read, rtol=0, atol=1e-3 * largest)


def test_some_heads_are_induction_heads(name: str, bridge: Any) -> None:
    """On repeated random tokens some head looks where its token was followed last time, and some head one back."""
    induction, previous = attention_scores_of_heads(ml.wrap(bridge))
    if name == "smollm2":
        assert float(induction.max()) > 0.5
    assert float(previous.max()) > 0.5
    assert float(induction.median()) < 0.2  # most are not


def test_the_sentence_that_wrote_the_answer_is_found(name: str, bridge: Any, plain: Plain) -> None:
    """Two paragraphs and a question: at both tokens of the answer contributions sum to the logit of plain transformers,
    and the sentence that names the river gives most, directly and when it is left out."""
    asked = ContextPrompt(VILLAGE, "Question: Which river runs past the old mill?\nAnswer: the river", label="Orla")
    result = ml.decompose(bridge, asked)
    assert [chunk.input.strip()[:12] for chunk in asked.demos][OLD_MILL] == "Its old mill"
    found = result.logits()
    assert len(found.answer) > 1
    fed = tuple(token for token, _ in found.token_ids)
    logits = plain.logits([*result.tokenized.ids, *fed[:-1]])[-len(fed) :]
    for step, token in enumerate(fed):
        error = abs(float(found.total[step] - logits[step, token]))
        assert error <= 1e-4 * float(logits[step].abs().max())
    torch.testing.assert_close(found.per_demo.sum(-1), found.meta_gradient, rtol=0, atol=1e-4)
    if name == "smollm2":
        by_chunk = found.per_demo[0].sum((0, 1))
        assert int(by_chunk.argmax()) == OLD_MILL
        effects = ml.head_effects(bridge, asked, metric="label_log_prob", heads=["L28H0"], progress=False)
        assert int(effects.demo_exact[0].argmax()) == OLD_MILL
        assert float(effects.exact[0, 28, 0]) > 0.5  # the head that copies it
