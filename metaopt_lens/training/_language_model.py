"""A small language model from scratch, wrapped, with momentum attention in it or not."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.interventions import MomentumAttention, intervene
from metaopt_lens.models import LensModel, wrap
from metaopt_lens.training._corpora import word_tokenizer
from metaopt_lens.training._short_convolution import ShortConvolution
from metaopt_lens.training._training_config import TrainingConfig
from metaopt_lens.training._training_settings import ModelSettings, MomentumSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A sigmoid rounds to 1 in float32; a learned eta stays below this.
_HIGHEST = 0.9995


@dataclass(frozen=True)
class LanguageModel:
    """A host being trained.

    Attributes:
        model: the wrapped host.
        weights: the module whose parameters are trained.
        logits_of_eta: what a learned eta is the sigmoid of; None where eta is fixed.
        settings: of the momentum.
    """

    model: LensModel
    weights: nn.Module
    logits_of_eta: Float[Tensor, "layer head"] | None
    settings: MomentumSettings

    @property
    def eta(self) -> Float[Tensor, "layer head"]:
        """eta of every head."""
        info = self.model.info
        if self.logits_of_eta is None:
            return torch.full((info.n_layers, info.n_heads), self.settings.eta, dtype=torch.float64)
        return _HIGHEST * torch.sigmoid(self.logits_of_eta)

    def momentum(self) -> MomentumAttention | ShortConvolution | None:
        """The momentum attention it has now, or its control; None for plain attention."""
        if self.logits_of_eta is None and self.settings.eta == 0.0:
            return None
        return ShortConvolution(self.eta, self.settings.lags) if self.settings.lags else MomentumAttention(self.eta)

    @contextmanager
    def with_momentum(self) -> Iterator[None]:
        """Within the block every forward pass of the host has the momentum attention in it."""
        momentum = self.momentum()
        with nullcontext() if momentum is None else intervene(self.model, momentum):
            yield

    def logits(self, tokens: Tensor) -> Tensor:
        """A forward pass, to be made within `with_momentum`.

        Args:
            tokens: token ids, ``[batch, pos]``.
        """
        return self.model.host(tokens)  # type: ignore[no-any-return]


def build_model(
    config: TrainingConfig,
    *,
    n_vocab: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
) -> LanguageModel:
    """A host with random weights, the same ones for every momentum: they depend on the seed and the sizes alone.

    Args:
        config: names architecture, momentum and seed.
        n_vocab: size of the vocabulary.
        tokenizer: kept with the model; None for bytes.
        device: where the weights are put.

    Raises:
        UnsupportedModelError: a HookedTransformer under TransformerLens 4.
    """
    make = {"bridge": _bridge, "native": _native, "hooked": _hooked}[config.model.host]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        host, weights = make(config.model, n_vocab, tokenizer)
    host.to(device, print_details=False)
    model = wrap(host)
    logits = None
    if config.momentum.learned:
        start = config.momentum.eta / _HIGHEST
        logits = torch.full((model.info.n_layers, model.info.n_heads), math.log(start / (1 - start)), device=device)
        logits.requires_grad_()
    return LanguageModel(model, weights, logits, config.momentum)


def _bridge(settings: ModelSettings, n_vocab: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, nn.Module]:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common: dict[str, Any] = {
        "vocab_size": n_vocab,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    hf: Any
    if settings.positions == "rotary":
        hf = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=settings.d_model,
                intermediate_size=settings.d_mlp,
                num_hidden_layers=settings.n_layers,
                num_attention_heads=settings.n_heads,
                max_position_embeddings=settings.n_ctx,
                attn_implementation="eager",
                **common,
            )
        )
    else:
        hf = GPT2LMHeadModel(
            GPT2Config(
                n_embd=settings.d_model,
                n_inner=settings.d_mlp,
                n_layer=settings.n_layers,
                n_head=settings.n_heads,
                n_positions=settings.n_ctx,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="eager",
                **common,
            )
        )
    hf.config.architectures = [type(hf).__name__]
    with tempfile.TemporaryDirectory() as folder:  # the bridge reads the architecture from a folder
        hf.config.save_pretrained(folder)
        # A bridge wants a tokenizer; bytes need none, so it is never asked.
        host = TransformerBridge.boot_transformers(
            folder, hf_model=hf, tokenizer=tokenizer or word_tokenizer(), device="cpu"
        )
    host.cfg.model_name = "momentum-lm"
    return host, hf


def _hooked(settings: ModelSettings, n_vocab: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, nn.Module]:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        raise UnsupportedModelError(
            "this TransformerLens has no HookedTransformer (it ended with 3.x): set model.host = 'bridge'."
        ) from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        host = HookedTransformer(
            HookedTransformerConfig(**_sizes(settings, n_vocab), model_name="momentum-lm", device="cpu", seed=None),
            tokenizer=tokenizer,
        )
    return host, host


def _native(settings: ModelSettings, n_vocab: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, nn.Module]:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(**_sizes(settings, n_vocab))
    host = TransformerBridge.boot_native(config, tokenizer=tokenizer, device="cpu", model_name="momentum-lm")
    return host, host.original_model


def _sizes(settings: ModelSettings, n_vocab: int) -> dict[str, Any]:
    """Settings in TransformerLens's own terms."""
    rotary = settings.positions == "rotary"
    d_head = settings.d_model // settings.n_heads
    return {
        "n_layers": settings.n_layers,
        "d_model": settings.d_model,
        "n_heads": settings.n_heads,
        "d_head": d_head,
        "d_mlp": settings.d_mlp,
        "n_ctx": settings.n_ctx,
        "d_vocab": n_vocab,
        "act_fn": "silu" if rotary else "gelu_new",
        "normalization_type": "RMS" if rotary else "LN",
        "final_rms": rotary,
        "gated_mlp": rotary,
        **({"positional_embedding_type": "rotary", "rotary_dim": d_head} if rotary else {}),
    }
