"""One finetuning step against a plain forward and backward pass for the gradients of the same projections.

    python benchmarks/bench_finetune.py                 # about 3 minutes on 2 cores

GPT-2-small-sized models with random weights, demonstrations of 32 tokens, keys and values of all 12 layers. The plain
pass runs the host's own forward, the same loss, and `torch.autograd.grad` for the host's own key and value parameters
alone. Sixteen passes, then a finetuning of sixteen steps, again and again, with 2 threads; medians of the ratios of
neighbours, by the clock and by processor time (which counts where others use the cores too). Exits 1 if a step costs
over 1.2 times as much by both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from metaopt_lens import wrap
from metaopt_lens.finetuning import finetune

THREADS, TOKENS, STEPS, ROUNDS, MAX_RATIO = 2, 32, 16, 5, 1.2
SIZE = {"n_layer": 12, "n_head": 12, "n_embd": 768}


def tokenizer() -> Any:
    """Words ``w0`` ... ``w199``; only their number matters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0} | {f"w{i}": i + 1 for i in range(200)}
    core = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<bos>", pad_token="<bos>")
    folder = tempfile.mkdtemp(prefix="metaopt-lens-bench-")
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def bridge() -> tuple[Any, list[torch.nn.Parameter]]:
    """A TransformerBridge, and its own key and value parameters."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZE, attn_implementation="eager", architectures=["GPT2LMHeadModel"])
    source = GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        host = TransformerBridge.boot_transformers(folder, hf_model=source, tokenizer=tokenizer(), device="cpu").eval()
    own = [getattr(getattr(b.attn, p), k) for b in host.blocks for p in ("k", "v") for k in ("weight", "bias")]
    return host, own


def hooked() -> tuple[Any, list[torch.nn.Parameter]] | None:
    """A HookedTransformer (TransformerLens 3.x), and its own key and value parameters."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        return None
    config = HookedTransformerConfig(
        n_layers=12,
        n_heads=12,
        d_model=768,
        d_head=64,
        d_mlp=3072,
        n_ctx=1024,
        d_vocab=50257,
        act_fn="gelu_new",
        normalization_type="LN",
        device="cpu",
        seed=0,
    )
    host = HookedTransformer(config, tokenizer=tokenizer()).eval()
    own = [getattr(b.attn, name) for b in host.blocks for name in ("W_K", "b_K", "W_V", "b_V")]
    return host, own


def plain_step(host: Any, own: list[torch.nn.Parameter], tokens: torch.Tensor) -> Callable[[], None]:
    """Forward, loss over all predicted tokens, gradients of these parameters only."""

    def step() -> None:
        for _ in range(STEPS):
            logits = host(tokens)
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
            torch.autograd.grad(loss, own)

    return step


def finetuning_step(host: Any) -> Callable[[], None]:
    """All of `finetune`: tokenising, hooks, forward, backward, update."""
    model, text = wrap(host), " ".join(f"w{i}" for i in range(TOKENS - 1))

    def step() -> None:
        finetune(model, [text] * STEPS, lr=0.01, progress=False)

    return step


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of the processors."""
    start = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measure(name: str, host: Any, own: list[torch.nn.Parameter], rounds: int) -> float:
    """Median over rounds of finetuning step / plain step, taken in turn; the lower of clock and processor time."""
    for parameter in host.parameters():
        parameter.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
    plain, ours = plain_step(host, own, torch.arange(TOKENS)[None]), finetuning_step(host)
    plain()
    ours()
    pairs = [(seconds(plain), seconds(ours)) for _ in range(rounds)]
    ratios = []
    for index, what in enumerate(("clock", "processor")):
        times = [1000 / STEPS * statistics.median(p[side][index] for p in pairs) for side in (0, 1)]
        ratios.append(statistics.median(b[index] / a[index] for a, b in pairs))
        print(f"{name:<18} {what:<10} plain {times[0]:7.1f} ms   step {times[1]:7.1f} ms   ratio {ratios[-1]:.2f}")
    return min(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often both are timed")
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ratios = []
    for name, build in (("TransformerBridge", bridge), ("HookedTransformer", hooked)):
        if (found := build()) is not None:
            ratios.append(measure(name, *found, rounds))
    return int(max(ratios) > MAX_RATIO)


if __name__ == "__main__":
    raise SystemExit(main())
