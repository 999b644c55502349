"""Many queries behind the same demonstrations: shared prefix against the batch of full prompts.

    python benchmarks/bench_prefix.py                   # the comparison, about 3 minutes on 2 cores
    python benchmarks/bench_prefix.py --growth out.html # also cost by queries and by demonstrations, with a plot

A GPT-2-small-sized model with random weights, 64 queries of 24 tokens behind 32 demonstrations (600 tokens). Each way
runs in a fresh process with 2 threads; memory is the highest resident size over that of the loaded model. Exits 1 if
the shared prefix is less than 8 times as fast, needs more than 1/3 of the memory, or gives other logits.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

THREADS, BATCH, N_QUERIES, QUERY_LENGTH, N_DEMOS, PREFIX_LENGTH = 2, 16, 64, 24, 32, 600
MIN_SPEEDUP, MAX_MEMORY, MAX_DIFFERENCE = 8.0, 1 / 3, 1e-3


def build(layers: int) -> Any:
    """A wrapped GPT-2 small with random weights."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from metaopt_lens import wrap

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, attn_implementation="eager", architectures=["GPT2LMHeadModel"])
    source = GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words())
        tokenizer.add_special_tokens({"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"})
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=source, tokenizer=tokenizer, device="cpu")
        return wrap(bridge.eval())


def _words() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))


def logits(model: Any, way: str, n_queries: int, n_demos: int) -> Any:
    """Last-position logits of every query."""
    import torch

    generator = torch.Generator().manual_seed(1)
    length = PREFIX_LENGTH * n_demos // N_DEMOS
    prefix = torch.randint(50257, (length,), generator=generator)
    queries = torch.randint(50257, (n_queries, QUERY_LENGTH), generator=generator)
    last = []
    shared = model.run_prefix(prefix) if way == "shared" else None
    for start in range(0, n_queries, BATCH):
        batch = queries[start : start + BATCH]
        if shared is None:
            batch = torch.cat([prefix.expand(len(batch), -1), batch], dim=1)
        last.append(model.run(batch, prefix=shared)[:, -1].clone())
    return torch.cat(last)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(way: str, n_queries: int, n_demos: int, layers: int, out: Path) -> None:
    """One way in this process."""
    import torch

    torch.set_num_threads(THREADS)
    model = build(layers)
    model.run(torch.ones(1, 4, dtype=torch.long))
    before, start, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    found = logits(model, way, n_queries, n_demos)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    torch.save(found, out.with_suffix(".pt"))
    out.write_text(json.dumps({**times, "bytes": max(peak_bytes() - before, 1)}))


def measure(way: str, n_queries: int, n_demos: int, layers: int, folder: Path) -> dict[str, Any]:
    """One way in a fresh process."""
    out = folder / f"{way}-{n_queries}-{n_demos}.json"
    options = ["--worker", way, "--queries", str(n_queries), "--demos", str(n_demos), "--layers", str(layers)]
    subprocess.run([sys.executable, __file__, *options, "--out", str(out)], check=True)
    return {**json.loads(out.read_text()), "logits": out.with_suffix(".pt")}


def compare(layers: int, folder: Path) -> bool:
    import torch

    shared, full = (measure(way, N_QUERIES, N_DEMOS, layers, folder) for way in ("shared", "full"))
    speedup, memory = full["seconds"] / shared["seconds"], shared["bytes"] / full["bytes"]
    difference = float((torch.load(shared["logits"]) - torch.load(full["logits"])).abs().max())
    for name, run in (("full prompts", full), ("shared prefix", shared)):
        cost = f"{run['seconds']:8.2f} s ({run['cpu_seconds']:.2f} s of CPU)"
        print(f"{name:14} {cost} {run['bytes'] / 2**20:8.0f} MiB above the model")
    print(f"{speedup:.1f} times as fast, {memory:.2f} of the memory, logits differ by {difference:.1e}")
    return speedup >= MIN_SPEEDUP and memory <= MAX_MEMORY and difference <= MAX_DIFFERENCE


def growth(layers: int, folder: Path, out: Path) -> None:
    """Seconds by number of queries and by number of demonstrations; written as a plot, with the data beside it."""
    import plotly.graph_objects as go

    rows = []
    for what, pairs in (
        ("queries", [(n, N_DEMOS) for n in (16, 32, 64, 128)]),
        ("demonstrations", [(N_QUERIES, n) for n in (8, 16, 24, 32)]),
    ):
        for n_queries, n_demos in pairs:
            run = measure("shared", n_queries, n_demos, layers, folder)
            number = n_queries if what == "queries" else n_demos
            rows.append({"by": what, "number": number} | {k: v for k, v in run.items() if k != "logits"})
            print(f"{number:4} {what:14} {run['seconds']:8.2f} s ({run['cpu_seconds']:.2f} s of CPU)")
    figure = go.Figure()
    for what in ("queries", "demonstrations"):
        points = [row for row in rows if row["by"] == what]
        figure.add_scatter(x=[p["number"] for p in points], y=[p["seconds"] for p in points], name=f"by {what}")
    figure.update_layout(xaxis_title="number", yaxis_title="seconds", title="Cost behind a shared prefix")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    figure.write_html(out, include_plotlyjs=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--growth", type=Path, metavar="HTML", help="also measure the growth, and plot it here")
    parser.add_argument("--worker", choices=("shared", "full"), help=argparse.SUPPRESS)
    parser.add_argument("--queries", type=int, default=N_QUERIES, help=argparse.SUPPRESS)
    parser.add_argument("--demos", type=int, default=N_DEMOS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker, options.queries, options.demos, options.layers, options.out)
        return
    with tempfile.TemporaryDirectory() as name:
        good = compare(options.layers, Path(name))
        if options.growth is not None:
            growth(options.layers, Path(name), options.growth)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
