"""The context of a pretrained model as weight changes, against plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import reviews
from plain import Plain
from torch import Tensor

from metaopt_lens import ICLPrompt, compile_context, intervene
from metaopt_lens.models import wrap
from metaopt_lens.patches import context_shares, generate_without_prompt

N_GENERATED = 20
# Five prompts of different tasks, short enough to be run twenty times.
PROMPTS = [
    reviews(4, "The plot is warm and very funny"),
    ICLPrompt([("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome")], "Spain"),
    ICLPrompt([("go", "went"), ("see", "saw"), ("take", "took")], "give"),
    ICLPrompt([("one", "two"), ("four", "five"), ("seven", "eight")], "two"),
    ICLPrompt([("cat", "cats"), ("dog", "dogs"), ("tree", "trees")], "house"),
]


def _logits(model: Any, ids: Any, n: int) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([list(ids)]))[0, -n:].clone()
    return found


def _greedy(model: Any, ids: Any) -> tuple[int, ...]:
    """Greedy text of plain transformers behind its own cache."""
    from transformers import DynamicCache

    cache, new, found = DynamicCache(), torch.tensor([list(ids)]), []
    with torch.inference_mode():
        for _ in range(N_GENERATED):
            found.append(int(model(new, past_key_values=cache, use_cache=True).logits[0, -1].argmax()))
            new = torch.tensor([found[-1:]])
    return tuple(found)


def test_patched_zero_shot_is_the_in_context_run(bridge: Any, plain: Plain, prompt: ICLPrompt) -> None:
    patch = compile_context(bridge, prompt)
    n = len(patch.query_ids)
    expected = plain.logits(patch.tokens.ids)[-n:]
    with intervene(bridge, patch):
        patched = _logits(bridge, patch.zero_shot_ids, n)
    largest = float(expected.abs().max())
    torch.testing.assert_close(patched, expected, rtol=0, atol=1e-4 * largest)
    assert (_logits(bridge, patch.zero_shot_ids, n) - expected).abs().max() > 1


def test_shares_sum_to_the_whole(bridge: Any, prompt: ICLPrompt, name: str) -> None:
    shares = context_shares(bridge, compile_context(bridge, prompt, precision="float64"))
    assert shares.norm_scale_fixed == (name == "gemma3-270m")
    torch.testing.assert_close(shares.by_head.sum(2), shares.by_demo.sum(2), rtol=0, atol=1e-9)
    if name == "smollm2":
        largest = float(shares.u.abs().max())
        torch.testing.assert_close(shares.by_head.sum(2), shares.u, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_twenty_greedy_tokens_without_the_prompt(name: str, bridge: Any, plain: Plain, number: int) -> None:
    if name != "smollm2":
        pytest.skip("asked of SmolLM2 only: Gemma's vocabulary makes it twice as long")
    patch = generate_without_prompt(bridge, PROMPTS[number], N_GENERATED)
    expected = _greedy(plain.model, patch.tokens.ids)
    assert patch.generated == expected
    # The finished patch gives the same text in one pass over the zero-shot prompt.
    with intervene(bridge, patch):
        again = _logits(bridge, patch.zero_shot_ids, N_GENERATED).argmax(-1)
    assert tuple(again.tolist()) == expected
    assert wrap(bridge).info.n_layers == plain.n_layers
