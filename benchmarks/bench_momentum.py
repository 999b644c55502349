"""What momentum attention costs: a training step with and without it, and the moving average by length.

    python benchmarks/bench_momentum.py [--rounds 5] [--threads 1]

Plain and momentum steps take turns, so that whatever else the machine does falls on both; times are medians of
processor time (`--wall`: of time on the clock). Limits: a training step of a model of 4 layers, d_model 256, 512 tokens
at most 1.15 x the plain one; the average itself linear in T: multiplications and memory within 1.1 x, and time growing
as T to the power of at most 1.15 over a factor of 64. (Time per token rises by up to a half where tensors outgrow the
processor's caches. Two narrow heads keep them below 32 MiB, where glibc begins to fetch every tensor anew from the
operating system: eight heads at T = 32768 take 2.8 times as long per token for that alone, and no longer than at
T = 4096 with GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592.)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from metaopt_lens.dual import momentum_values
from metaopt_lens.training import LanguageModel, TrainingConfig, build_model
from metaopt_lens.training._corpora import Batch
from metaopt_lens.training._optimization import make_optimizer, training_step

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
STEP_LIMIT, LINEAR_LIMIT, EXPONENT_LIMIT = 1.15, 1.1, 1.15


def config(eta: float, *, learned: bool = False, host: str = "bridge") -> TrainingConfig:
    return TrainingConfig().replace(
        model={"n_layers": 4, "d_model": 256, "n_heads": 8, "d_mlp": 1024, "n_ctx": 512, "host": host},
        momentum={"eta": eta, "learned": learned},
        optimizer={"batch": 4},
    )


def stepper(setting: TrainingConfig, n_vocab: int = 257) -> Callable[[], None]:
    lm: LanguageModel = build_model(setting, n_vocab=n_vocab)
    optimizer = make_optimizer(lm, setting)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(n_vocab, (4, 512), generator=draw)
    batch = Batch(tokens, torch.ones(4, 511))
    lm.weights.train()
    return lambda: (training_step(lm, optimizer, batch, setting, 100), None)[1]


def alternate(
    functions: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = clock()
            function()
            times[name].append(clock() - began)
    return times


def averages(rounds: int, clock: Callable[[], float]) -> pd.DataFrame:
    """By length: seconds and multiplications of the average and its gradient, peak bytes of the forward beyond input
    and output."""
    rows = []
    for n in LENGTHS:
        values = torch.randn(1, n, 2, 32, requires_grad=True)
        eta = torch.full((2,), 0.9, requires_grad=True)

        def run(values: torch.Tensor = values, eta: torch.Tensor = eta) -> None:
            momentum_values(values, eta).sum().backward()

        with FlopCounterMode(display=False) as counted:
            run()
        times = []
        for _ in range(rounds):
            began = clock()
            run()
            times.append(clock() - began)
        with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
            momentum_values(values, eta)
        peak = peak_bytes(profile) - 4 * values.numel()
        rows.append({"T": n, "seconds": min(times), "multiplications": counted.get_total_flops() / 2, "peak": peak})
    return pd.DataFrame(rows).set_index("T")


def peak_bytes(profile: torch.profiler.profile) -> int:
    """Most bytes held at once, from the profiler's record of allocations."""
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="clock time instead of processor time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    failed = False

    steps = {
        "plain": stepper(config(0.0)),
        "eta fixed": stepper(config(0.5)),
        "eta learned": stepper(config(0.5, learned=True)),
    }
    times = alternate(steps, options.rounds, clock)
    print(f"training step, 4 layers, d_model 256, batch 4 x 512, {options.threads} thread(s)")
    for name, found in times.items():
        ratio = statistics.median([a / b for a, b in zip(found, times["plain"], strict=True)])
        over = ratio > STEP_LIMIT
        failed |= over
        print(
            f"  {name:12} {statistics.median(found):7.3f} s   {ratio:5.3f} x plain"
            + ("   OVER THE LIMIT" if over else "")
        )

    table = averages(options.rounds, clock)
    print("moving average of [1, T, 2, 32] and its gradient; peak memory of the forward beyond input and output")
    linear = table.div(table.iloc[0]).div(table.index / table.index[0], axis=0)
    for n, row in table.iterrows():
        over = max(linear.loc[n, "multiplications"], linear.loc[n, "peak"]) > LINEAR_LIMIT
        failed |= over
        print(
            f"  T = {n:5}: {1e3 * row['seconds']:8.2f} ms ({linear.loc[n, 'seconds']:.2f} x linear), "
            f"{row['multiplications'] / 1e6:8.1f} M multiplications ({linear.loc[n, 'multiplications']:.2f}), "
            f"{row['peak'] / 2**20:7.2f} MiB ({linear.loc[n, 'peak']:.2f})" + ("   OVER THE LIMIT" if over else "")
        )
    exponent = float(np.polyfit(np.log(table.index), np.log(table["seconds"]), 1)[0])
    over = exponent > EXPONENT_LIMIT
    failed |= over
    print(f"  time grows as T^{exponent:.2f}" + ("   OVER THE LIMIT" if over else ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
