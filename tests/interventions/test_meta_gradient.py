"""Applying a meta-gradient to zero-shot passes the user makes on the host: the in-context run, exactly."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hosts import HOST_NAMES, prompt, shared, tokenized
from torch import Tensor

from metaopt_lens.interventions import MetaGradient, intervene, meta_gradient

QUERIES = ("w16 w17 :", "w40 :", "w31 w90 w16 w60 :")
NO_DOUBLE = {"bridge:gpt_oss", "bridge:mixtral"}


@cache
def made(name: str, dtype: torch.dtype = torch.float32) -> MetaGradient:
    return meta_gradient(shared(name, dtype), prompt())


def ids(name: str, query: str) -> tuple[list[int], list[int]]:
    """The prompt in context and without demonstrations."""
    tokens = tokenized(shared(name), prompt(query=query))
    return list(tokens.ids), list(tokens.zero_shot().ids)


def logits(model: Any, tokens: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options)


def merge_error(name: str, dtype: torch.dtype) -> float:
    model, worst = shared(name, dtype), 0.0
    for query in QUERIES:
        full, zero_shot = ids(name, query)
        n = len(zero_shot) - made(name).tokens.start
        with intervene(model, made(name, dtype)):
            merged = logits(model, [zero_shot])[0, -n:]
        expected = logits(model, [full])[0, -n:]
        plain = logits(model, [zero_shot])[0, -n:]
        assert (plain - expected).abs().max() > 1e-2  # there is something to reproduce
        worst = max(worst, float((merged - expected).abs().max()))
    return worst


@pytest.mark.parametrize("name", HOST_NAMES)
def test_merge_on_all_heads_is_the_in_context_run(name: str) -> None:
    assert merge_error(name, torch.float32) < 1e-4
