"""analyze_records against a straightforward implementation of the same definitions (stdlib json and numpy).

    python benchmarks/bench_analyze.py                  # full size, about 1.2 GB of JSON and 2 minutes
    python benchmarks/bench_analyze.py --queries 10 --demos 4

Each runs in a fresh process; times are wall times of the whole process, imports included, the best of
--repeat. Exits 1 if ours takes more than 1/5 of the time, 1/3 of the memory or 3 GiB in all, or if the numbers differ.
The targets are meant for the full size: at small sizes the imports weigh more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYERS, HEADS, WIDTH = 24, 32, 2048
MAX_TIME, MAX_MEMORY, MAX_TOTAL = 1 / 5, 1 / 3, 3 * 2**30


def make_recording(directory: Path, n_queries: int, n_demos: int) -> None:
    """Random records of a 1.3B model, updates correlated so that no metric is trivial."""
    import torch

    from metaopt_lens.records import DemoRecord, QueryRecord, write_records

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(14, 30, (n_queries,), generator=generator).tolist()
    demos = torch.randint(18, 28, (n_demos,), generator=generator).tolist()
    context = 1 + sum(demos)
    gold = torch.randint(2, (n_queries,), generator=generator).tolist()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def queries(kind: str) -> Iterator[QueryRecord]:
        same = torch.Generator().manual_seed(1)
        for length, label in zip(lengths, gold, strict=True):
            shared = torch.randn(LAYERS, WIDTH, generator=same), torch.randn(LAYERS, HEADS, length, generator=same)
            yield QueryRecord(
                attn_out=shared[0] + 0.5 * normal(LAYERS, WIDTH),
                attn_map=shared[1] + 0.5 * normal(LAYERS, HEADS, length),
                gold_label=label,
                pred_label=int(torch.randint(2, (), generator=generator)),
                attn_map_ctx=normal(LAYERS, context) if kind == "icl" else None,
                attn_q=normal(LAYERS, WIDTH) / WIDTH**0.5 if kind == "ftzs" else None,
            )

    write_records(
        directory,
        zs=queries("zs"),
        icl=queries("icl"),
        ftzs=queries("ftzs"),
        ft=(DemoRecord(normal(LAYERS, tokens, WIDTH)) for tokens in demos),
    )


def straightforward(directory: Path) -> dict[str, Any]:
    """The definitions, as one writes them down: read everything, then loop."""
    import numpy as np
    from scipy.stats import kendalltau

    records: dict[str, Any] = {}
    for kind in ("zs", "icl", "ftzs", "ft"):
        with (directory / kind / "record_info.jsonl").open() as file:
            records[kind] = [json.loads(line) for line in file]
    settings = ("zs", "icl", "ftzs")
    gold = np.array([record["gold_label"] for record in records["zs"]])

    def cosine(a: Any, b: Any) -> Any:
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-20)

    hidden = {}
    for kind in settings:
        array = np.array([record["self_attn_out_hiddens"] for record in records[kind]])
        hidden[kind] = array / (np.linalg.norm(array, axis=-1, keepdims=True) + 1e-20)
    found: dict[str, Any] = {"SimAOU": cosine(hidden["icl"] - hidden["zs"], hidden["ftzs"] - hidden["zs"])}
    maps: dict[str, list[Any]] = {"SimAM": [], "ZSL SimAM": [], "ICL-FTZS SimAM": []}
    for i in range(len(gold)):
        icl, zs, ft = (np.array(records[kind][i]["attn_map"]) for kind in ("icl", "zs", "ftzs"))
        maps["SimAM"].append(cosine(icl, ft).mean(-1))
        maps["ZSL SimAM"].append(cosine(icl, zs).mean(-1))
        maps["ICL-FTZS SimAM"].append(cosine(icl - zs, ft - zs).mean(-1))
    found |= {name: np.array(values) for name, values in maps.items()}
    demos = [np.array(record["attn_q"])[:, 1:] for record in records["ft"]]
    sizes = [demo.shape[1] for demo in demos]
    tokens = np.concatenate(demos, axis=1)
    kept, start = [], 1
    for size in sizes:
        kept += range(start, start + size)
        start += size + 1
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def softmax(x: Any) -> Any:
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    training: dict[str, list[Any]] = {}
    for i in range(min(100, len(gold))):
        icl = softmax(np.array(records["icl"][i]["attn_map_ctx"])[:, kept])
        ft = softmax(np.einsum("ltd,ld->lt", tokens, np.array(records["ftzs"][i]["attn_q"])))
        for level, k in (("example", 5), ("token", 100)):
            pair = icl, ft
            if level == "example":
                pair = np.add.reduceat(icl, offsets, -1), np.add.reduceat(ft, offsets, -1)
            k = min(k, pair[0].shape[-1])
            recall, kendall = [], []
            for a, b in zip(*pair, strict=True):
                recall.append(len(set(np.argsort(-a)[:k]) & set(np.argsort(-b)[:k])) / k)
                kendall.append(kendalltau(a, b)[0])
            training.setdefault(f"{level}-level recall_topk", []).append(recall)
            training.setdefault(f"{level}-level kendall", []).append(kendall)
    found |= {name: np.array(values) for name, values in training.items()}
    return {name: values.mean(0).tolist() for name, values in found.items()}


def ours(directory: Path) -> dict[str, Any]:
    """The library's."""
    from metaopt_lens.analysis import Convention
    from metaopt_lens.records import analyze_records

    blocks = analyze_records(directory, convention=Convention.PUBLISHED).to_dict()
    published = blocks["dai2022"]["all"] | blocks["deutch2024"]["all"] | blocks["dai2022"]["training_attention"]
    return {name: values for name, values in published.items() if isinstance(values, list)}


def measure(name: str, directory: Path) -> tuple[float, int, dict[str, Any]]:
    """Seconds, peak bytes (all processes together) and result of a fresh process, printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--run", name, str(directory)], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - start
    report = json.loads(done.stdout)
    # the processor time tells how far other work on the machine has disturbed the measurement
    print(f"  {name:16} {seconds:7.2f} s  (CPU {report['cpu']:6.2f} s)  {report['peak'] / 2**30:5.2f} GiB", flush=True)
    return seconds, report["peak"], report["result"]


def run(name: str, directory: Path) -> None:
    """In the fresh process: work, then print result and peak memory."""
    from joblib.externals.loky import get_reusable_executor

    result = {"straightforward": straightforward, "ours": ours}[name](directory)
    get_reusable_executor().shutdown(wait=True)  # a process counts once it has ended
    unit = 1 if sys.platform == "darwin" else 1024
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    n_workers = min(os.cpu_count() or 1, 2)
    # the largest of the parsing processes, as if all had been as large at the same moment
    peak = own.ru_maxrss + children.ru_maxrss * n_workers
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    print(json.dumps({"peak": peak * unit, "cpu": cpu, "result": result}))


def compare(directory: Path, repeat: int) -> bool:
    """Print the measurements; True if the targets are met."""
    size = sum(file.stat().st_size for file in directory.glob("*/*.jsonl"))
    print(f"recording: {size / 1e9:.2f} GB of JSON")
    best: dict[str, tuple[float, int, dict[str, Any]]] = {}
    for _ in range(repeat):
        for name in ("straightforward", "ours"):
            got = measure(name, directory)
            if name not in best or got[0] < best[name][0]:
                best[name] = got
    base, mine = best["straightforward"], best["ours"]
    gap = max(abs(a - b) for name, layers in mine[2].items() for a, b in zip(layers, base[2][name], strict=True))
    checks = {
        f"time     {mine[0] / base[0]:.3f} of straightforward (target {MAX_TIME:.3f})": mine[0] <= MAX_TIME * base[0],
        f"memory   {mine[1] / base[1]:.3f} of straightforward (target {MAX_MEMORY:.3f})": (
            mine[1] <= MAX_MEMORY * base[1]
        ),
        f"in all   {mine[1] / 2**30:.2f} GiB (target {MAX_TOTAL / 2**30:.0f})": mine[1] <= MAX_TOTAL,
        f"numbers  agree to {gap:.1e} (target 1e-9)": gap <= 1e-9,
    }
    for text, met in checks.items():
        print(("met     " if met else "MISSED  ") + text)
    return all(checks.values())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--demos", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run[0], Path(options.run[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make_recording(Path(folder), options.queries, options.demos)
        return 0 if compare(Path(folder), options.repeat) else 1


if __name__ == "__main__":
    sys.exit(main())
