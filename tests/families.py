"""Small random models of every supported family, built from a transformers config without any hub."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
N_CTX = 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": N_CTX,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": N_CTX,
        "multi_query": True,
    },
    "opt": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 6,
    },
    "llama": {"model_type": "llama", **_GROUPED},
    "llama_mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": 6, "head_dim": 8, **_GROUPED},
    "qwen2": {"model_type": "qwen2", **_GROUPED},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, **_GROUPED},
    "olmo2": {"model_type": "olmo2", **_GROUPED},
    "stablelm": {"model_type": "stablelm", "partial_rotary_factor": 0.5, **_GROUPED},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
    "gpt_neox_sequential": {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": False},
    "gptj": {"model_type": "gptj", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": N_CTX, "rotary_dim": 4},
    "bloom": {"model_type": "bloom", "n_layer": 3, "n_head": 4},
    "mpt": {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": N_CTX},
    "falcon": {"model_type": "falcon", "alibi": False, "multi_query": True, "parallel_attn": True, "bias": True},
    "gemma": {"model_type": "gemma", "head_dim": 8, **_GROUPED},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 5,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        **_GROUPED,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 5,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **_GROUPED,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 6,
        **_GROUPED,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, **_GROUPED},
}


def make_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The small transformers config of a family."""
    options = {**_SIZES, **FAMILIES[family], **overrides}
    model_type = options.pop("model_type")
    return CONFIG_MAPPING[model_type](**options)


def randomize_(model: nn.Module, seed: int) -> None:
    """Draw norms and biases too: a fresh config leaves them at 1 and 0, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim >= 2:
                parameter.copy_(noise * 0.5 / parameter.shape[-1] ** 0.5 if "embed" not in name else noise * 0.5)
            elif "norm" in name or "ln" in name:
                is_bias = name.endswith("bias")
                parameter.copy_(0.3 * noise + (0.0 if is_bias else 1.0))
            else:
                parameter.copy_(0.3 * noise)


def make_hf(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random transformers model of the family, in eval mode."""
    model = AutoModelForCausalLM.from_config(make_config(family, **overrides), attn_implementation="eager")
    randomize_(model, seed)
    return model.to(dtype).eval()


@cache
def tokenizer() -> Any:
    """A word-level tokenizer over ``w3`` ... ``w95`` (plus ':' and newline), ids equal to the numbers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, ":": 3, "\n": 4, "->": 5}
    words |= {f"w{i}": i for i in range(6, VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|:"), "isolated"),
            pre_tokenizers.Split(Regex(r"[ \t]+"), "removed"),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )
    # TransformerLens loads it again by its name, so the folder lives as long as the process.
    folder = tempfile.mkdtemp(prefix="metaopt-lens-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_bridge(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A TransformerBridge over a random model of the family."""
    return bridge_of(make_hf(family, seed=seed, dtype=dtype, **overrides))


def bridge_of(hf_model: Any, own_tokenizer: Any = None, *, bos: bool | None = True) -> Any:
    """A TransformerBridge over this transformers model (or TransformerLens's own), built without any hub.

    Prompts begin with BOS whatever the architecture's own default (`bos` None), so that all hosts read the same ids.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if not hasattr(hf_model, "config"):
        return _bridge_of_native(hf_model, own_tokenizer or tokenizer())
    hf_model.config.architectures = [type(hf_model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        hf_model.config.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(
            folder,
            hf_model=hf_model,
            tokenizer=own_tokenizer or tokenizer(),
            dtype=hf_model.dtype,
            device="cpu",
        )
    if bos is not None:
        bridge.cfg.default_prepend_bos = bos
    return bridge.eval()


def _bridge_of_native(model: Any, its_tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    weights = model.state_dict()
    dtype = next(iter(weights.values())).dtype
    bridge = TransformerBridge.boot_native(model.cfg, tokenizer=its_tokenizer, device="cpu", dtype=dtype)
    own = {name.replace("._original_component", ""): p for name, p in bridge.original_model.named_parameters()}
    assert set(weights) == set(own) - {"head.bias"}  # the bridge gives the unembedding one, of zeros
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    return bridge.eval()


def has_hooked_transformer() -> bool:
    """Whether this TransformerLens still has HookedTransformer (3.x)."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return False
    return HookedTransformer is not None


_LENS_SIZES: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "d_head": 8,
    "d_mlp": 48,
    "n_ctx": N_CTX,
    "d_vocab": VOCAB,
    "act_fn": "gelu",
}

HOOKED: dict[str, dict[str, Any]] = {
    "learned": {"normalization_type": "LN"},
    "rotary": {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "gated_mlp": True,
        "act_fn": "silu",
        "n_key_value_heads": 2,
        "final_rms": True,
    },
    "partial_rotary_parallel": {
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "parallel_attn_mlp": True,
    },
    "alibi": {"normalization_type": "LN", "positional_embedding_type": "alibi"},
    "attn_only": {"normalization_type": "LN", "attn_only": True},
    "gpt_neo": {
        "normalization_type": "LN",
        "use_attn_scale": False,
        "use_local_attn": True,
        "window_size": 6,
        "attn_types": ["global", "local", "local"],
    },
    "no_norm": {"normalization_type": None},
    "window_softcap": {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "use_local_attn": True,
        "window_size": 6,
        "attn_types": ["local", "global", "local"],
        "attn_scores_soft_cap": 2.0,
        "attn_scale": 1.7,
        "use_normalization_before_and_after": True,
    },
    "qk_norm": {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "use_qk_norm": True,
        "n_key_value_heads": 1,
    },
}


def make_hooked(kind: str = "learned", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A native HookedTransformer (TransformerLens 3.x) with random weights, norms and biases."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    options: dict[str, Any] = {
        **_LENS_SIZES, "dtype": dtype, "device": "cpu", "seed": seed, **HOOKED[kind], **overrides
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig(**options), tokenizer=tokenizer())
    randomize_(model, seed)
    return model.eval()


NATIVE: dict[str, dict[str, Any]] = {
    "learned": {"normalization_type": "LN", "attn_scale": 1.7},
    "rotary": {
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "gated_mlp": True,
        "act_fn": "silu",
        "n_key_value_heads": 2,
        "final_rms": True,
        "attn_scores_soft_cap": 2.0,
        "output_logits_soft_cap": 5.0,
    },
}


def make_native_model(
    kind: str = "learned", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """TransformerLens's own model that `TransformerBridge.boot_native` bridges, with random weights, norms, biases."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import NativeModel

    model = NativeModel(TransformerBridgeConfig(**{**_LENS_SIZES, **NATIVE[kind], **overrides}))
    randomize_(model, seed)
    return model.to(dtype).eval()


ModelFactory = Callable[..., Any]
