"""Patch and application in higher precision than the model: one rounding instead of many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import build, prompt
from torch import Tensor

from metaopt_lens import compile_context, intervene
from metaopt_lens.models import wrap
from metaopt_lens.runs import run_shared_prefix

PROMPT = prompt(6)


@pytest.mark.parametrize(("precision", "kept"), [(None, torch.float32), ("float64", torch.float64)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_products_are_those_in_context_to_the_bit(family: str, precision: str | None, kept: torch.dtype) -> None:
    """``W z + left``, summed in the higher precision and rounded once; in the model's own it is not."""
    model = build(f"bridge:{family}", dtype=torch.bfloat16)
    patch = compile_context(model, PROMPT, precision=precision)
    assert {t.dtype for t in (*patch.left.values(), *patch.right.values())} == {kept}
    naive = compile_context(model, PROMPT, precision="model")
    assert {t.dtype for t in (*naive.left.values(), *naive.right.values())} == {torch.bfloat16}
    seen: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        seen.append(tensor.reshape(-1, tensor.shape[-1])[-3:])

    wrapped, at = wrap(model), "blocks.0.mlp.in.hook_out"
    prefix = run_shared_prefix(wrapped, patch.tokens.ids[: patch.tokens.query.start])
    ids = torch.tensor([list(patch.query_ids)])
    wrapped.run(ids, prefix=prefix, hooks=[(at, lambda tensor: keep(tensor, None))])
    for made in (patch, naive):
        with intervene(model, made), torch.no_grad():
            model.run_with_hooks(torch.tensor([list(patch.zero_shot_ids)]), fwd_hooks=[(at, keep)])
    in_context, patched, by_itself = seen
    assert torch.equal(patched, in_context)
    assert not torch.equal(by_itself, in_context)


@pytest.mark.parametrize("precision", ["model", None])
def test_logits_in_bfloat16_are_those_in_context_to_its_rounding(precision: str | None) -> None:
    model = build("bridge:llama", dtype=torch.bfloat16)
    patch = compile_context(model, PROMPT, precision=precision)
    with torch.no_grad():
        in_context = model(torch.tensor([list(patch.tokens.ids)]))[0, -3:].float()
        zero_shot = model(torch.tensor([list(patch.zero_shot_ids)]))[0, -3:].float()
        with intervene(model, patch):
            patched = model(torch.tensor([list(patch.zero_shot_ids)]))[0, -3:].float()
    allowed = 10 * torch.finfo(torch.bfloat16).eps * float(in_context.abs().max())
    assert (patched - in_context).abs().max() < allowed < (zero_shot - in_context).abs().max() / 5
