"""Small GGUF files of random Llama models, written with the `gguf` package as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import make_hf
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from transformers.convert_slow_tokenizer import bytes_to_unicode

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKENS = [*bytes_to_unicode().values(), "<|pad|>", "<|bos|>", "<|eos|>", "an", "Ġan"]
MERGES = ["a n", "Ġ an"]
_NORMAL, _CONTROL = 1, 3


def small_llama(**overrides: Any) -> Any:
    """A random Llama whose sizes are multiples of 32, which quantised blocks need."""
    return make_hf("llama", vocab_size=len(TOKENS), intermediate_size=64, **overrides)


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    file_type: LlamaFileType | None = LlamaFileType.ALL_F32,
    quantised: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: bool = True,
    rope_factors: torch.Tensor | None = None,
    settings: dict[str, Any] | None = None,
    leave_out: str | None = None,
    add_bos: bool = True,
) -> Path:
    """Write `model` to `path`; matrices are quantised, norms are not."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("small")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (settings or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([_CONTROL if token.startswith("<|") else _NORMAL for token in TOKENS])
        writer.add_token_merges(MERGES)
        writer.add_pad_token_id(TOKENS.index("<|pad|>"))
        writer.add_bos_token_id(TOKENS.index("<|bos|>"))
        writer.add_eos_token_id(TOKENS.index("<|eos|>"))
        writer.add_add_bos_token(add_bos)
    for name, tensor in tensors_of(model).items():
        if name == leave_out:
            continue
        if tensor.ndim == 2 and quantised != GGMLQuantizationType.F32:
            writer.add_tensor(name, quants.quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, tensor)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """GGUF's names; rows of queries and keys interleave the two halves of a rotary pair."""
    config = model.config
    found = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name in _NAMES:
            found[_NAMES[name]] = tensor.numpy()
            continue
        _, _, layer, *middle, suffix = name.split(".")
        inner = ".".join(middle)
        for kind, n_heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if inner.endswith(kind):
                rows, columns = tensor.shape
                # [head * 2 * half, d_model] -> [head, 2, half, d_model] -> [head, half, 2, d_model] -> as before
                tensor = tensor.view(n_heads, 2, rows // n_heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        found[f"blk.{layer}.{_IN_LAYER[inner]}.{suffix}"] = tensor.contiguous().numpy()
    return found
