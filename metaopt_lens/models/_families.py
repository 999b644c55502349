"""What is special about a family of models: one table. A new family is a row (and one in `tests/families.py`).

An architecture without a row is treated as an ordinary one; the self-check decides whether that is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.models._rotation import GPTJ, NATIVE, NEOX, PLAIN, ROTATED, QueryKeyReader


def _scaling(module: Any, d_head: int) -> float:
    return float(getattr(module, "scaling", d_head**-0.5))


def _softcap(module: Any) -> float | None:
    return _enabled(getattr(module, "attn_logit_softcapping", None))


def _logit_cap(model: Any) -> float | None:
    return _enabled(getattr(getattr(model, "config", None), "final_logit_softcapping", None))


def _enabled(cap: Any) -> float | None:
    return float(cap) if cap is not None and cap > 0 else None  # TransformerLens's own models say -1


def _bloom_slopes(n_heads: int, device: torch.device) -> Tensor:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    mask = torch.ones(1, 2, device=device)
    return build_alibi_tensor(mask, n_heads, torch.float32)[:, 0, 1]  # type: ignore[no-any-return]


def _mpt_slopes(n_heads: int, device: torch.device) -> Tensor:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    return -build_mpt_alibi_tensor(n_heads, 2, device=device)[:, 0, 0]  # type: ignore[no-any-return]


def _gpt_neo_window(module: Any) -> int | None:
    return int(module.config.window_size) if module.attention_type == "local" else None


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as docs/models.md lists it; "" for what is refused.
        architecture: transformers' name, or TransformerLens's.
        reader: where a bridge shows queries and keys as the scores see them.
        scale: factor on ``q . k``, from the attention module and d_head.
        softcap: soft-cap of the scores, from the attention module.
        logit_cap: soft-cap of the logits, from the whole model.
        slopes: ALiBi slopes, from the number of heads; None without ALiBi.
        positions: how positions enter, where the architecture leaves a choice; see `ModelInfo`.
        window: sliding window, from the attention module; None where transformers' configuration states it.
        post_norm: whether the outputs of attention and MLP are normalised, and not their inputs.
        refused: why models of this architecture are refused; "" where they are not.
    """

    name: str
    architecture: str
    reader: QueryKeyReader = ROTATED
    scale: Callable[[Any, int], float] = _scaling
    softcap: Callable[[Any], float | None] = _softcap
    logit_cap: Callable[[Any], float | None] = _logit_cap
    slopes: Callable[[int, torch.device], Float[Tensor, " head"]] | None = None
    positions: str = ""
    window: Callable[[Any], int | None] | None = None
    post_norm: bool = False
    refused: str = ""


_LLAMA_4 = "some of its layers attend in chunks, others scale queries by their position, and no hook shows it"
_FALCON_ALIBI = (
    "transformers' eager attention, which TransformerLens runs, adds Falcon's ALiBi bias twice, so this is not the "
    "model that was trained"
)

FAMILIES = (
    Family("GPT-2", "GPT2LMHeadModel", PLAIN),
    Family("GPT-BigCode", "GPTBigCodeForCausalLM", PLAIN),
    Family("OPT", "OPTForCausalLM", PLAIN),
    Family("GPT-Neo", "GPTNeoForCausalLM", PLAIN, scale=lambda *_: 1.0, window=_gpt_neo_window),
    Family("Llama", "LlamaForCausalLM"),
    Family("Qwen2", "Qwen2ForCausalLM"),
    Family("Mixtral", "MixtralForCausalLM"),
    Family("Gemma", "GemmaForCausalLM"),
    Family("Mistral", "MistralForCausalLM"),
    Family("Gemma-2", "Gemma2ForCausalLM"),
    Family("Gemma-3", "Gemma3ForCausalLM"),
    Family("Qwen3", "Qwen3ForCausalLM"),
    Family("OLMo-2", "Olmo2ForCausalLM", post_norm=True),
    Family("StableLM", "StableLmForCausalLM"),
    Family("Phi", "PhiForCausalLM"),
    Family("GPT-OSS", "GptOssForCausalLM"),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", NEOX),
    Family("GPT-J", "GPTJForCausalLM", GPTJ, scale=lambda module, _: 1.0 / float(module.scale_attn)),
    Family(
        "BLOOM", "BloomForCausalLM", PLAIN,
        scale=lambda module, _: float(module.inv_norm_factor),
        slopes=_bloom_slopes,
    ),
    Family(
        "MPT", "MptForCausalLM", PLAIN,
        scale=lambda module, _: float(module.softmax_scale),
        slopes=_mpt_slopes,
    ),
    Family("Falcon", "FalconForCausalLM", NEOX, positions="rotary"),
    Family(
        "TransformerLens's own model", "TransformerLensNative", NATIVE,
        scale=lambda module, _: 1.0 / float(module.scale),
        softcap=lambda module: _enabled(module.attn_scores_soft_cap),
        logit_cap=lambda model: _enabled(model.output_logits_soft_cap),
    ),
    Family("", "Olmo3ForCausalLM", post_norm=True),
    Family("", "FalconForCausalLM", positions="alibi", refused=_FALCON_ALIBI),
    Family("", "Llama4ForCausalLM", refused=_LLAMA_4),
    Family("", "Llama4ForConditionalGeneration", refused=_LLAMA_4),
)  # fmt: skip

_ROWS = {(family.architecture, family.positions): family for family in FAMILIES}


def family_of(architecture: str, positions: str, attention: type | None = None) -> Family:
    """The row of an architecture, or one that says nothing special.

    Args:
        architecture: transformers' name, or TransformerLens's.
        positions: how positions enter; see `ModelInfo`.
        attention: class of the bridge's attention, which tells where an unknown family shows q and k.
    """
    known = _ROWS.get((architecture, positions)) or _ROWS.get((architecture, ""))
    if known is not None:
        return known
    if positions != "rotary":
        return Family("", architecture, PLAIN)
    return Family("", architecture, NEOX if attention is not None and attention.__name__ == _FUSED else ROTATED)


_FUSED = "JointQKVPositionEmbeddingsAttentionBridge"  # shows no rotated queries and keys
