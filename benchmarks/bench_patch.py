"""What compiling a context into weights costs, and what a patch holds.

    python benchmarks/bench_patch.py
    python benchmarks/bench_patch.py --model smollm2    # a pretrained model, from its package

A GPT-2-small-sized model with random weights behind a TransformerBridge, 512 tokens (32 demonstrations, a query of 16
tokens), 2 threads. `compile_context` is timed beside the two passes it cannot do without: the in-context prompt, and
the zero-shot prompt under the finished patch. All in one process, interleaved; a ratio is the median over rounds of
that round's ratio, so that a machine that slows down slows both sides. With ``--model`` the same on a pretrained
model and a prompt of 32 demonstrations in plain words.

The size of a patch is that of its tensors, for queries of 8, 16 and 32 words: numbers per token and layer, in units of
d_model + d_mlp, must not grow, and stay far below d_model x d_mlp. With a gated MLP
they are exactly 3.

Exits 1 if compiling takes more than 1.3 times the two passes, or a patch holds more than 3 (d_model + d_mlp) numbers
per token and layer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from bench_decompose import ROUNDS, THREADS, prompt
from bench_decompose import build as gpt2

MAX_OVER_PASSES, MAX_NUMBERS = 1.3, 3.0


def build() -> Any:
    """GPT-2 small with random weights behind a TransformerBridge, which puts BOS first."""
    bridge = gpt2("bridge")
    bridge.cfg.default_prepend_bos = True
    return bridge


def plain_words(n_query: int) -> Any:
    """32 demonstrations and a query of `n_query` words that every tokenizer knows."""
    from metaopt_lens import ICLPrompt

    words = ("house", "river", "stone", "green", "seven", "table", "window", "music")
    demos = [(" ".join(words[(i + j) % 8] for j in range(12)), words[i % 4]) for i in range(32)]
    return ICLPrompt(demos, " ".join(words[j % 8] for j in range(n_query)))


def seconds(way: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def numbers_held(patch: Any) -> float:
    """Numbers of a patch per token and layer, in units of d_model + d_mlp."""
    held = [*patch.left.values(), *patch.right.values(), patch.u]
    d_model, d_mlp = patch.u.shape[-1], patch.left["in"].shape[-1]
    per_row: float = sum(t.numel() for t in held) / (patch.model.n_layers * len(patch.query_ids))
    return per_row / (d_model + d_mlp)


def main() -> int:
    """Time, sizes, and the exit code."""
    import torch

    from metaopt_lens import compile_context, intervene, load_model, wrap
    from metaopt_lens.models import Readout

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained model; without it, one of GPT-2 small's sizes")
    name = parser.parse_args().model
    torch.set_num_threads(THREADS)
    model, make = (wrap(build()), prompt) if name is None else (wrap(load_model(name, device="cpu")), plain_words)
    asked = make(16)
    patch = compile_context(model, asked)

    def last(ids: Any) -> Any:
        return model.run(torch.tensor([list(ids)]), read=Readout(torch.tensor([[len(ids) - 1]])))

    def passes() -> None:
        last(patch.tokens.ids)
        with intervene(model, patch):
            last(patch.zero_shot_ids)

    passes()
    rounds = [(seconds(lambda: compile_context(model, asked)), seconds(passes)) for _ in range(ROUNDS)]
    ratio = statistics.median(compiling / two for compiling, two in rounds)
    median = statistics.median(compiling for compiling, _ in rounds)
    print(f"compile {median:.2f} s, {ratio:.2f} x the two passes ({MAX_OVER_PASSES} at most)")
    sizes = [numbers_held(compile_context(model, make(n))) for n in (8, 16, 32)]
    text = ", ".join(f"{size:.2f}" for size in sizes)
    print(f"numbers per token and layer, in d_model + d_mlp, for 8, 16, 32 words: {text} ({MAX_NUMBERS} at most)")
    return int(ratio > MAX_OVER_PASSES or max(sizes) > MAX_NUMBERS)


if __name__ == "__main__":
    sys.exit(main())
