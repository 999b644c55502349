"""Prompts as JSON-able values, for saved results."""

from __future__ import annotations

import dataclasses
from typing import Any

from metaopt_lens._types import TokenSpan
from metaopt_lens.prompts import Demo, ICLPrompt, Template, TokenizedPrompt


def prompt_to_meta(prompt: ICLPrompt, tokenized: TokenizedPrompt) -> dict[str, Any]:
    """Everything needed to build both again without a tokenizer."""
    return {"text": dataclasses.asdict(prompt), "tokenized": dataclasses.asdict(tokenized)}


def prompt_from_meta(meta: dict[str, Any]) -> tuple[ICLPrompt, TokenizedPrompt]:
    """Inverse of `prompt_to_meta`; raises KeyError or TypeError on anything else."""
    text, ids = dict(meta["text"]), dict(meta["tokenized"])
    text["demos"] = [Demo(**demo) for demo in text["demos"]]
    text["template"] = Template(**text["template"])
    for name in ("bos", "instruction", "query"):
        ids[name] = None if ids[name] is None else TokenSpan(**ids[name])
    for name in ("demos", "demo_inputs", "labels"):
        ids[name] = tuple(TokenSpan(**span) for span in ids[name])
    for name in ("ids", "tokens"):
        ids[name] = tuple(ids[name])
    return ICLPrompt(**text), TokenizedPrompt(**ids)
