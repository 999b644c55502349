"""Load the bundled model, as a TransformerBridge or a HookedTransformer, with weights as trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.models.tiny._tiny_files import copy_weights, read_model, read_tokenizer
from metaopt_lens.models.tiny._vocabulary import BOS, CONTEXT_WINDOW, EOS, PAD, WORDS

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"
NAME = "metaopt-lens-tiny"


def model_config(*, attention: str = "eager") -> LlamaConfig:
    """The architecture: a three-layer Llama, which both model classes of TransformerLens know."""
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


@overload
def load_tiny(
    backend: Literal["bridge"] = "bridge",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> TransformerBridge: ...


@overload
def load_tiny(
    backend: Literal["hooked"],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> HookedTransformer: ...


def load_tiny(
    backend: str = "bridge",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> TransformerBridge | HookedTransformer:
    """Load the bundled model, which learns in context which label word stands for which category of nouns.

    Ask it with text such as ``"apple : dax\\nhammer : wug\\npear :"``; the words it knows are in
    ``metaopt_lens.models.tiny.CATEGORIES`` and ``LABELS``. Nothing is downloaded, and torch's global random
    state is left as it was.

    It was trained on 12 to 24 items of four tokens (at most 97 tokens) with 2 to 4 categories. The context
    window is longer, but beyond that length accuracy falls: on four categories 0.9 with 32 demonstrations,
    chance with 60.

    Args:
        backend: ``"bridge"`` for a TransformerBridge, ``"hooked"`` for a HookedTransformer (3.x only).
        dtype: floating-point type of the weights.
        device: where to put the model; the CPU if not given.

    Returns:
        The model in eval mode, its weights unprocessed (nothing folded or centred).

    Raises:
        OptionError: `backend` is neither of the two.
        UnsupportedModelError: ``"hooked"`` under TransformerLens 4, which has no HookedTransformer.
        FileFormatError: a file of the model is missing or damaged.
    """
    return load_folder(DATA, backend, dtype=dtype, device=device)


def load_folder(
    folder: str | Path,
    backend: str = "bridge",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> TransformerBridge | HookedTransformer:
    """`load_tiny` for another folder that the training script wrote.

    Args:
        folder: what the training script wrote.
        backend: ``"bridge"`` or ``"hooked"``.
        dtype: of the weights.
        device: where the weights are put.
    """
    if backend not in ("bridge", "hooked"):
        raise OptionError(f"backend must be 'bridge' or 'hooked', got {backend!r}.")
    if backend == "hooked":
        _hooked_class()  # refuse before reading anything
    place = torch.device("cpu" if device is None else device)
    with torch.random.fork_rng(devices=[]):  # every constructor below draws initial weights
        source = read_model(Path(folder)).to(device=place, dtype=dtype).eval()
        tokenizer = read_tokenizer(Path(folder))
        if backend == "hooked":
            return _as_hooked(source, tokenizer)
        return _as_bridge(source, tokenizer, Path(folder))


def _as_bridge(source: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge

    parameter = source.lm_head.weight
    bridge = TransformerBridge.boot_transformers(
        str(folder),
        hf_model=source,
        tokenizer=tokenizer,
        dtype=parameter.dtype,
        device=str(parameter.device),
    )
    bridge.cfg.model_name = NAME  # the folder is a path on this machine: it belongs in no result
    return bridge.eval()


def _hooked_class() -> Any:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        raise UnsupportedModelError(
            "this TransformerLens has no HookedTransformer (it ended with 3.x): "
            "use load_tiny('bridge'), or install transformer-lens<4."
        ) from None
    return HookedTransformer


def _as_hooked(source: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> HookedTransformer:
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config, parameter = source.config, source.lm_head.weight
    cfg = HookedTransformerConfig(
        model_name=NAME,
        original_architecture="LlamaForCausalLM",
        d_model=config.hidden_size,
        d_head=config.hidden_size // config.num_attention_heads,
        n_heads=config.num_attention_heads,
        d_mlp=config.intermediate_size,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn=config.hidden_act,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=config.hidden_size // config.num_attention_heads,
        rotary_base=config.rope_parameters["rope_theta"],
        dtype=parameter.dtype,
        device=str(parameter.device),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        model = _hooked_class()(cfg, tokenizer=tokenizer)
    copy_weights(dict(model.named_parameters()), convert_llama_weights(source, cfg), "HookedTransformer")
    return model.eval()
