"""Parts read as words, against the product with the unembedding written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import build_hf, prompt, shared

from metaopt_lens import decompose, finetune, wrap
from metaopt_lens._errors import HeadError, OptionError
from metaopt_lens.analysis import finetuning_words, value_update_words
from metaopt_lens.decomposition import LensWords


def split(name: str = "bridge:llama") -> Any:
    return decompose(shared(name), prompt())


def values(words: LensWords) -> dict[int, float]:
    return {word.token_id: word.value for word in (*words.promoted, *words.suppressed)}


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_words_are_the_parts_contributions_to_every_token(family: str) -> None:
    """The whole vocabulary, token by token, as `logits` gives it, less its mean."""
    result = split(f"bridge:{family}")
    for part in ("meta_gradient", "zero_shot"):
        found = values(result.lens("L1H2", part, top=96))
        each = torch.stack([getattr(result.logits(token, versus=()), part)[1, 2] for token in range(96)])
        expected = each - each.mean()
        torch.testing.assert_close(torch.tensor([found[t] for t in range(96)]), expected, rtol=1e-4, atol=1e-5)
    shown = result.lens("L1H2", top=3)
    best = torch.stack([result.logits(token, versus=()).meta_gradient[1, 2] for token in range(96)]).argsort()
    assert [word.token_id for word in shown.promoted] == best.flip(0)[:3].tolist()
    assert [word.token_id for word in shown.suppressed] == best[:3].tolist()
    assert repr(shown).startswith("meta_gradient of L1H2\n  promotes: ")
    assert shown.to_frame()["value"].is_monotonic_decreasing


def test_layers_and_demonstrations() -> None:
    """A layer is the sum of its heads, the meta-gradient that of the demonstrations."""
    result = split()

    def all_of(**what: Any) -> torch.Tensor:
        found = values(result.lens(top=96, **what))
        return torch.tensor([found[token] for token in range(96)])

    heads = sum(all_of(head=(1, head)) for head in range(4))
    torch.testing.assert_close(all_of(layer=1), heads, rtol=1e-4, atol=1e-5)
    demos = sum(all_of(head="L1H2", demo=demo) for demo in range(4))
    torch.testing.assert_close(all_of(head="L1H2"), demos, rtol=1e-4, atol=1e-5)
    both = all_of(head="L1H2", part="zero_shot") + all_of(head="L1H2")
    torch.testing.assert_close(all_of(head="L1H2", part="z"), both, rtol=1e-4, atol=1e-5)
    mlp = all_of(layer=1, part="mlp")
    each = torch.stack([result.logits(token, versus=()).mlp[1] for token in range(96)])
    torch.testing.assert_close(mlp, each - each.mean(), rtol=1e-4, atol=1e-5)


def test_linear_parts_through_plain_weights() -> None:
    """``dW_ICL q`` through the transformers model's own o_proj, gain and lm_head."""
    result = split()
    hf = build_hf("llama")
    dw = result.delta_w_icl(2, 3)
    z = dw.AB @ result.q[2, 3]
    out = z @ hf.model.layers[2].self_attn.o_proj.weight[:, 24:32].T
    logits = (out * hf.model.norm.weight) @ hf.lm_head.weight.T
    logits = (logits - logits.mean()).detach() / result.logits(6, versus=()).scale
    found = values(result.lens((2, 3), "linear_meta_gradient", top=96))
    torch.testing.assert_close(torch.tensor([found[t] for t in range(96)]), logits, rtol=1e-4, atol=1e-4)


def test_the_identity_map_is_the_logit_lens_bit_for_bit() -> None:
    result = split()
    plain = result.lens("L1H2")
    for maps in (torch.eye(32).expand(3, -1, -1), {1: torch.eye(32)}, [torch.eye(32)] * 3):
        assert result.lens("L1H2", maps=maps) == plain
    turned = result.lens("L1H2", maps={1: torch.roll(torch.eye(32), 1, 0)})
    assert turned.promoted != plain.promoted


def test_a_map_is_applied_before_the_final_norm() -> None:
    """Any map: the vector times it, then gain and unembedding, written out."""
    model, result = wrap(shared("bridge:llama")), split()
    some = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    vector = result.softmax.meta_gradient[1, 2] @ model.w_o(1)[2]
    norm = model.head.fixed_norm
    logits = (vector @ some * norm.gain / result.logits(6, versus=()).scale) @ model.head.w_u
    found = values(result.lens("L1H2", maps={1: some}, top=96))
    expected = (logits - logits.mean()).detach()
    torch.testing.assert_close(torch.tensor([found[t] for t in range(96)]), expected, rtol=1e-4, atol=1e-4)


def test_a_heads_update_as_a_whole() -> None:
    """Singular directions: dW_ICL is made of them, left ones are written, right ones read from the keys."""
    model, result = wrap(shared("bridge:llama")), split()
    directions = result.lens_update(1, 2, k=8, top=96)
    dw = result.delta_w_icl(1, 2).AB
    u, s, vh = torch.linalg.svd(dw)
    assert [d.size for d in directions] == pytest.approx(s.tolist(), rel=1e-4, abs=1e-5)
    norm, first = model.head.fixed_norm, directions[0]
    logits = ((u[:, 0] @ model.w_o(1)[2]) * norm.gain) @ model.head.w_u
    found = values(first.words)
    expected = (logits - logits.mean()).detach()
    actual = torch.tensor([found[t] for t in range(96)])
    torch.testing.assert_close(actual.abs(), expected.abs(), rtol=1e-3, atol=1e-4)
    keys = result.runs.icl.k_of(1)[result.demonstrations.slice, 1]
    sizes = sorted((abs(value) for _, value in first.tokens), reverse=True)
    assert sizes == pytest.approx((keys @ vh[0]).abs().sort(descending=True).values.tolist(), rel=1e-3, abs=1e-4)


def test_finetuning_updates_as_words() -> None:
    """``dW_FT q`` of no update says nothing; of one it is linear in W_O; its W_V directions are those of the update."""
    model = shared("bridge:llama")
    result = split()
    update = finetune(model, prompt(), lr=0.05)
    words = finetuning_words(result, update, "L1H2", top=96)
    assert max(abs(word.value) for word in words.promoted) > 1e-4
    nothing = finetuning_words(result, update * 0.0, "L1H2", top=96)
    assert max(abs(word.value) for word in nothing.promoted) < 1e-6
    (first, *_) = value_update_words(result, update, "L1H2", k=2)
    assert first[0] == pytest.approx(float(torch.linalg.matrix_norm(update.w_v[1, 1], 2)), rel=1e-4)
    assert first[1].name.endswith("reads")
    assert first[2].name.endswith("writes")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head": "L9H0"}, HeadError, "there is no head L9H0: the model has layers 0 to 2"),
        ({"layer": 3}, HeadError, "there is no head L3H0: the model has layers 0 to 2"),
        ({"head": "L1H1", "part": "values"}, OptionError, "part must be 'meta_gradient', 'zero_shot', .* got 'values'"),
        ({}, OptionError, "name a head, as in lens\\('L3H7'\\), or a layer"),
        ({"head": "L1H1", "part": "mlp"}, OptionError, "an MLP belongs to a layer"),
        ({"head": "L1H1", "demo": 4}, OptionError, "there is no demonstration 4: the prompt has 4, counted from 0"),
        ({"head": "L1H1", "demo": 0, "part": "z"}, OptionError, "a demonstration has a share of 'meta_gradient'"),
        ({"head": "L1H1", "maps": {1: torch.eye(16)}}, OptionError, r"the lens of layer 1 is \[16, 16\], but"),
        ({"head": "L1H1", "maps": {0: torch.eye(32)}}, OptionError, r"the lens has no map for layer 1, only for \[0\]"),
        ({"head": "L1H1", "top": 0}, OptionError, "top must be at least 1, got 0"),
    ],
)
def test_bad_requests(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split().lens(**arguments)
