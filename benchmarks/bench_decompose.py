"""What a decomposition costs, against the passes it cannot do without and against caching everything.

    python benchmarks/bench_decompose.py

A GPT-2-small-sized model with random weights, a prompt of 512 tokens (32 demonstrations, a query of 16 tokens), 2
threads. `decompose` (read: softmax, linear, effects) is timed beside

- the two passes: in-context and zero-shot prompt through the same wrapper, with the logits of the last token, which
  `decompose` keeps as the model's answer;
- the cached run: `run_with_cache` of both prompts and the same sums on what it holds (no position-matched run).

All in one process, interleaved; a ratio is the median over rounds of that round's ratio, so that a machine that slows
down slows both sides. Memory is the highest resident size (VmHWM, reset after a warm-up), each way in a fresh process:
what the operating system saw, whoever allocated it.

Exits 1 if decompose takes more than 1.15 times the two passes, or more than 0.75 times the cached run of a
HookedTransformer (a bridge's is printed), or its peak lies above the two passes' peak by more than 15 % of the cache.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS, ROUNDS, N_DEMOS, N_TOKENS, N_QUERY, VOCAB = 2, 7, 32, 512, 16, 50257
MAX_OVER_PASSES, MAX_OVER_CACHED, MAX_MEMORY = 1.15, 0.75, 0.15
Way = Callable[[], Any]


def tokenizer() -> Any:
    """Words ``w6`` ... to ids 6 ..., and the marks of the template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, ":": 3, "\n": 4} | {f"w{i}": i for i in range(6, VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n|:"), "isolated"), pre_tokenizers.Split(Regex(r"[ \t]+"), "removed")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def prompt(n_query: int = N_QUERY) -> Any:
    """32 demonstrations and a query of `n_query` tokens (by default each of 15 or 16); with BOS 512 tokens."""
    from metaopt_lens import ICLPrompt

    rest = N_TOKENS - 1 - n_query
    demos, used = [], 0
    for i in range(N_DEMOS):
        length = (rest - used) // (N_DEMOS - i)
        words = " ".join(f"w{100 + used + j}" for j in range(length - 3))  # a colon, a label, a line end
        demos.append((words, f"w{10 + i % 4}"))
        used += length
    return ICLPrompt(demos, " ".join(f"w{2000 + j}" for j in range(n_query - 1)))


def build(host: str) -> Any:
    """GPT-2 small with random weights, as a HookedTransformer or behind a TransformerBridge."""
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if host == "hooked":
            from transformer_lens import HookedTransformer, HookedTransformerConfig

            config = HookedTransformerConfig(
                n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, n_ctx=1024, d_vocab=VOCAB,
                act_fn="gelu_new", normalization_type="LN", device="cpu",
            )  # fmt: skip
            return HookedTransformer(config, tokenizer=_reloadable()).eval()
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=VOCAB, attn_implementation="eager", architectures=["GPT2LMHeadModel"])
        source = GPT2LMHeadModel(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            bridge = TransformerBridge.boot_transformers(folder, hf_model=source, tokenizer=_reloadable(), device="cpu")
        return bridge.eval()


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _reloadable() -> Any:
    """TransformerLens loads a tokenizer again by its folder's name."""
    from transformers import AutoTokenizer

    _FOLDERS.append(tempfile.TemporaryDirectory())
    tokenizer().save_pretrained(_FOLDERS[-1].name)
    return AutoTokenizer.from_pretrained(_FOLDERS[-1].name)


def ways(host: str) -> dict[str, Way]:
    """The three things that are compared."""
    import torch

    from metaopt_lens import decompose, wrap
    from metaopt_lens.dual import linear_weights, split_softmax, split_sources
    from metaopt_lens.models import Readout
    from metaopt_lens.prompts import tokenize_prompt

    model, text = build(host), prompt()
    wrapped = wrap(model)
    tokens = tokenize_prompt(text, model.tokenizer)
    assert (tokens.n_tokens, len(tokens.query), len(tokens.demos)) == (N_TOKENS, N_QUERY, N_DEMOS)
    full, zero_shot = (torch.tensor([t.ids]) for t in (tokens, tokens.zero_shot()))
    visible = torch.ones(1, N_TOKENS, dtype=torch.bool)

    def two_passes() -> None:
        for ids in (full, zero_shot):
            wrapped.run(ids, read=Readout(torch.tensor([[ids.shape[1] - 1]])))

    def decomposed() -> Any:
        result = decompose(model, text)
        return result, result.softmax, result.linear, result.effects

    def cached() -> Any:
        found = []
        with torch.no_grad():
            caches = [model.run_with_cache(ids)[1] for ids in (full, zero_shot)]
            for layer in range(wrapped.info.n_layers):
                at = f"blocks.{layer}.attn.hook_"
                q, k, v, z = (caches[0][at + kind] for kind in ("q", "k", "v", "z"))
                parts = split_softmax(caches[0][at + "pattern"][:, :, -1:], v, tokens.demonstrations)
                linear = split_sources(linear_weights(q[:, -1:], k, visible), v, tokens.demonstrations)
                total = z[:, -1] - caches[1][at + "z"][:, -1]
                found.append((parts, linear, total))
        return caches, found

    return {"passes": two_passes, "decompose": decomposed, "cached": cached}


def timed(way: Way) -> tuple[float, float]:
    """Seconds on the wall, and of processor time (both threads together)."""
    wall, processor = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - wall, time.process_time() - processor


def measure_time(host: str, n_rounds: int) -> dict[str, Any]:
    """Median seconds of each way, and median ratios."""
    compared = ways(host)
    for way in compared.values():
        way()  # warm up
    rounds = [{name: timed(way) for name, way in compared.items()} for _ in range(n_rounds)]
    seconds = {name: statistics.median(r[name][0] for r in rounds) for name in compared}

    def ratio(kind: int) -> dict[str, float]:
        others = ("passes", "cached")
        return {other: statistics.median(r["decompose"][kind] / r[other][kind] for r in rounds) for other in others}

    return {"seconds": seconds, "ratio": ratio(0), "processor": ratio(1)}


def measure_memory(host: str, way: str) -> dict[str, Any]:
    """MiB above the loaded, warmed-up model at the peak of one way; and the size of what a cached run holds."""
    compared = ways(host)
    compared["decompose"]()  # imports, thread pools and lazily made tables are no cost of one more run
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _high_water()
    kept = compared[way]()
    peak = _high_water() - before
    size = sum(t.numel() * t.element_size() for cache in kept[0] for t in cache.values()) if way == "cached" else 0
    return {"peak": peak, "cache": size / 2**20}


def _high_water() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def child(*arguments: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def report(host: str, threads: int, rounds: int) -> bool:
    """Print one host's figures; whether all targets are met."""
    common = ("--threads", str(threads), "--rounds", str(rounds))
    times = child("--time", host, *common)
    memory = {way: child("--memory", host, way, *common) for way in ("passes", "decompose", "cached")}
    seconds, ratio = times["seconds"], times["ratio"]
    above = memory["decompose"]["peak"] - memory["passes"]["peak"]
    share = above / memory["cached"]["cache"]
    good = ratio["passes"] <= MAX_OVER_PASSES and share <= MAX_MEMORY
    if host == "hooked":
        good = good and ratio["cached"] <= MAX_OVER_CACHED
    target = f"(at most {MAX_OVER_CACHED})" if host == "hooked" else "(no target)"
    print(f"{host}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    used = times["processor"]
    print(f"  decompose / the two passes  {ratio['passes']:.3f} (at most {MAX_OVER_PASSES}; CPU {used['passes']:.3f})")
    print(f"  decompose / the cached run  {ratio['cached']:.3f} {target}; CPU {used['cached']:.3f}")
    print(
        f"  peak above the loaded model: passes {memory['passes']['peak']:.0f} MiB, decompose "
        f"{memory['decompose']['peak']:.0f} MiB, cached run {memory['cached']['peak']:.0f} MiB"
    )
    print(
        f"  decompose above the two passes: {above:.0f} MiB, {share:.1%} of the cache's "
        f"{memory['cached']['cache']:.0f} MiB (at most {MAX_MEMORY:.0%})"
    )
    print(f"  {'met' if good else 'MISSED'}")
    return good


def main() -> int:
    """Run everything, or one part in a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", metavar="HOST")
    parser.add_argument("--memory", nargs=2, metavar=("HOST", "WAY"))
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--host", choices=["hooked", "bridge"], help="only this class of model")
    options = parser.parse_args()
    if options.time or options.memory:
        import torch

        torch.set_num_threads(options.threads)
        timing = options.time is not None
        print(json.dumps(measure_time(options.time, options.rounds) if timing else measure_memory(*options.memory)))
        return 0
    hosts = [options.host] if options.host else ["hooked", "bridge"]
    if "hooked" in hosts and not _has_hooked():
        print("hooked: this TransformerLens has no HookedTransformer")
        hosts.remove("hooked")
    met = [report(host, options.threads, options.rounds) for host in hosts]
    return 0 if all(met) else 1


def _has_hooked() -> bool:
    code = "from transformer_lens import HookedTransformer"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
