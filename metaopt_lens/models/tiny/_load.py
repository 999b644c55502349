from __future__ import annotations
from metaopt_lens.models.tiny._vocabulary import BOS, CONTEXT_WINDOW, EOS, PAD, WORDS
WEIGHTS_FILE = "model.safetensors"
def model_config(*, attention: str = "eager"):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_act="silu",
        max_position_embeddings=CONTEXT_WINDOW,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        initializer_range=0.02,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        attn_implementation=attention,
    )
