"""What a pretrained model costs: SmolLM2-135M or Gemma-3-270M on sentiment prompts, against the passes it takes.

    python benchmarks/bench_real.py                                 # everything, about 20 minutes on 2 cores
    python benchmarks/bench_real.py --model gemma3-270m --parts decompose,memory,heads
    python benchmarks/bench_real.py --parts growth --plot docs/images/cost.svg --json growth.json

Parts, each beside its yardstick in the same process, the two taking turns; a ratio is the median over rounds of that
round's ratio, and seconds are the fastest round's:

- decompose: 32 demonstrations (read: softmax, linear, effects, predictions), against its own passes: S and D, the query
  in context and position-matched together, the query alone.
- says: `decompose` of one prompt with the lens of one head and the contributions to one answer, against `decompose`
  alone.
- memory: the highest resident size of `decompose` above that of the loaded model, in a fresh process.
- compare: 48 queries behind 16 demonstrations with one draw of shuffled labels, against the passes it needs: in context
  and position-matched, zero-shot, finetuned, finetuned position-matched, and in context behind the shuffled
  demonstrations, each ended where it is read. (The update does not say how it was made, so that no finetuning on
  shuffled labels is in it.)
- heads: exact effects of all heads on 8 queries behind 16 demonstrations, against one whole pass per head and query
  behind the shared prefix, with the head's knock-out attached and batches as large as memory allows; a sample of heads
  is timed and scaled up. Also the whole of `head_effects`, with estimates, demonstrations and the recovery curve.
- growth: `decompose` by queries, by demonstrations, and by layers (random weights of SmolLM2's sizes).

Exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("decompose", "says", "memory", "compare", "heads", "growth")
WARM_MEMORY = 4  # demonstrations of the warm-up before memory is measured
MAX = {"decompose": 1.15, "says": 1.10, "memory": 512.0, "compare": 1.5, "heads": {"smollm2": 0.4, "gemma3-270m": 0.25}}
LABELS = ("positive", "negative")
Way = Callable[[], Any]

_SUBJECTS = ("the plot", "this cast", "the second half", "her first film", "the script", "every scene", "the music")
_PRAISE = ("moves along with warmth and wit", "finds real feeling in small things", "is sharp, funny and generous")
_BLAME = ("drags from the first joke to the last", "never finds a reason to exist", "is loud, empty and far too long")
_ENDINGS = ("and stays with you for days", "as the best of its kind do", "whatever the posters may say", "in the end")


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    shots: int
    queries: int
    compared: int
    head_queries: int
    sample: int
    rounds: int


def sentence(number: int) -> tuple[str, str]:
    """The n-th invented film review of about 18 tokens, and its label."""
    label = number % 2
    said = (_PRAISE, _BLAME)[label][number // 2 % 3]
    subject, ending = _SUBJECTS[number // 6 % 7], _ENDINGS[number // 42 % 4]
    return f"{subject} {said} {ending}", LABELS[label]


def prompts(n_demos: int, n_queries: int) -> list[Any]:
    from metaopt_lens import ICLPrompt

    demos = [sentence(i) for i in range(n_demos)]
    queries = [sentence(97 + 5 * i) for i in range(n_queries)]
    return [ICLPrompt(demos, text, label=label, candidates=LABELS) for text, label in queries]


class Passes:
    """The passes that something takes, and nothing else: on the wrapped model, ended where they are read."""

    def __init__(self, model: Any, texts: Sequence[Any]) -> None:
        from metaopt_lens.runs import tokenize_for

        self.model = model
        self.tokens = [tokenize_for(model, text) for text in texts]
        self.before = self.tokens[0].demonstrations.start
        self.queries = [t.ids[t.query.start :] for t in self.tokens]

    def prefix(self, tokens: Any = None) -> Any:
        import torch

        of = self.tokens[0] if tokens is None else tokens
        return self.model.run_prefix(torch.tensor(of.ids[: of.query.start]))

    def run(self, prefix: Any, *, copies: int = 1, read: bool = True) -> None:
        """All queries behind a prefix, each so many times in one batch, as large as memory allows."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from metaopt_lens.models import Readout
        from metaopt_lens.runs import choose_batch_size

        longest, n_prefix = max(map(len, self.queries)), 0 if prefix is None else prefix.n_tokens
        fits = choose_batch_size(self.model, n_new=longest, n_prefix=n_prefix, n_read=int(read))
        size = max(1, fits // copies)
        for start in range(0, len(self.queries), size):
            batch = self.queries[start : start + size] * copies
            ids = pad_sequence([torch.tensor(query) for query in batch], batch_first=True)
            ends = Readout(torch.tensor([[len(query) - 1] for query in batch]))
            self.model.run(ids, prefix=prefix, read=ends if read else None, stop_after_attention=not read)


def timed(way: Way) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def compared(name: str, ours: Way, yardstick: Way, rounds: int, *, scale: float = 1.0) -> dict[str, Any]:
    """Both ways in turn; `scale` times the yardstick is what the whole would take."""
    for way in (ours, yardstick):
        way()  # warm up
    pairs = [(timed(ours), scale * timed(yardstick)) for _ in range(rounds)]
    ratio = statistics.median(one / other for one, other in pairs)
    found = {"seconds": min(p[0] for p in pairs), "yardstick": min(p[1] for p in pairs), "ratio": ratio}
    print(f"{name}: {found['seconds']:.2f} s, yardstick {found['yardstick']:.2f} s, ratio {ratio:.3f}", flush=True)
    return found


def bench_decompose(model: Any, sizes: Sizes) -> dict[str, Any]:
    from metaopt_lens import decompose

    (text,) = prompts(sizes.shots, 1)
    passes = Passes(model, [text])

    def ours() -> Any:
        result = decompose(model, text)
        return result.softmax, result.linear, result.effects, result.predict()

    def yardstick() -> None:
        prefix = passes.prefix()
        passes.run(prefix, copies=2)
        passes.run(prefix.truncate(passes.before))

    n_tokens = passes.tokens[0].n_tokens
    return compared(f"decompose, {sizes.shots} shots, {n_tokens} tokens", ours, yardstick, sizes.rounds)


def bench_says(model: Any, sizes: Sizes) -> dict[str, Any]:
    from metaopt_lens import decompose

    (text,) = prompts(sizes.shots, 1)

    def ours() -> Any:
        result = decompose(model, text)
        return result.logits(), result.lens((model.info.n_layers - 1, 0))

    return compared("decompose with contributions and lens", ours, lambda: decompose(model, text), sizes.rounds)


def bench_memory(model: Any, sizes: Sizes) -> dict[str, Any]:
    """In this process, which has done nothing else."""
    from metaopt_lens import decompose

    ours = lambda n: decompose(model, prompts(n, 1)[0])  # noqa: E731
    ours(WARM_MEMORY)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = high_water()
    result = ours(sizes.shots)
    _ = result.softmax, result.linear, result.effects, result.predict()
    return {"peak": high_water() - before}


def high_water() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def bench_compare(model: Any, sizes: Sizes) -> dict[str, Any]:
    from metaopt_lens import compare, finetune
    from metaopt_lens.analysis import Controls, shuffle_labels
    from metaopt_lens.runs import tokenize_for

    texts = prompts(16 if sizes.shots >= 16 else sizes.shots, sizes.compared)
    update = dataclasses.replace(finetune(model, texts[0], lr=1e-3, progress=False), settings=None)
    passes, shuffled = Passes(model, texts), tokenize_for(model, shuffle_labels(texts[0], seed=0))

    controls = Controls(shuffled_labels=1, flipped_labels=False, unrelated_text=False)

    def ours() -> None:
        compare(model, texts, update, controls=controls, progress=False)

    def yardstick() -> None:
        prefix = passes.prefix()
        passes.run(prefix, copies=2)
        passes.run(prefix.truncate(passes.before))
        passes.run(passes.prefix(shuffled))
        with update.applied(model):
            changed = passes.prefix()
            passes.run(changed.truncate(passes.before))
            passes.run(changed, read=False)

    return compared(f"compare, {len(texts)} queries", ours, yardstick, sizes.rounds)


def bench_heads(model: Any, sizes: Sizes) -> dict[str, Any]:
    import torch

    from metaopt_lens import head_effects
    from metaopt_lens.interventions._answer_metric import answer_metric
    from metaopt_lens.interventions._demo_tokens import DemoTokens
    from metaopt_lens.interventions._knock_out_runs import KnockOutRuns, knocked_out
    from metaopt_lens.runs import choose_batch_size

    texts = prompts(16 if sizes.shots >= 16 else sizes.shots, sizes.head_queries)
    passes, info = Passes(model, texts), model.info
    prefix, demos = passes.prefix(), DemoTokens.of(passes.tokens[0])
    n_runs = info.n_layers * info.n_heads * len(texts)
    one_each = torch.eye(info.n_layers * info.n_heads, dtype=torch.bool).view(-1, info.n_layers, info.n_heads)
    metric = answer_metric(model, texts, passes.tokens, "logit_difference")
    longest = max(map(len, passes.queries))
    rows = min(n_runs, choose_batch_size(model, n_new=longest, n_prefix=prefix.n_tokens, n_read=longest))
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(passes.queries[i % len(texts)]) for i in range(rows)], batch_first=True
    )
    hidden = demos.mask(range(len(demos.spans)), demos.stop).expand(rows, -1)
    layers = [round((i + 0.5) * info.n_layers / sizes.sample) for i in range(sizes.sample)]

    def exact() -> None:
        KnockOutRuns(model, demos, prefix, metric).exact(
            one_each, torch.ones(len(one_each), len(demos.spans), dtype=torch.bool)
        )

    def whole_passes() -> None:
        """One batch for each layer of the sample, one head knocked out in each row, logits at every position."""
        for layer in layers:
            chosen = torch.zeros(rows, info.n_heads, dtype=torch.bool)
            chosen[torch.arange(rows), torch.arange(rows) % info.n_heads] = True
            hooks = model.attention_hooks(layer, knocked_out(chosen, hidden), prefix=prefix)
            logits = model.run(ids, prefix=prefix, hooks=hooks)
            assert logits is not None
            for row, query in enumerate(logits):
                metric.value(query[: len(passes.queries[row % len(texts)])][-1:, metric.tokens], row % len(texts))

    scale = n_runs / (rows * len(layers))
    print(f"heads: {n_runs} knock-outs; yardstick: {rows * len(layers)} of them in batches of {rows}, scaled up")
    what = f"{info.n_layers * info.n_heads} heads, {len(texts)} queries"
    found = compared(f"exact effects, {what}", exact, whole_passes, sizes.rounds, scale=scale)
    seconds = timed(lambda: head_effects(model, texts, progress=False))
    print(f"  head_effects with everything {seconds:.2f} s, {seconds / found['yardstick']:.3f} of the yardstick")
    return found | {"everything": seconds}


def bench_growth(model: Any, sizes: Sizes) -> list[dict[str, Any]]:
    from metaopt_lens import decompose

    rows = []

    def measure(by: str, number: int, host: Any, n_demos: int, n_queries: int) -> None:
        texts = prompts(n_demos, n_queries)
        seconds = min(timed(lambda: decompose(host, texts)) for _ in range(sizes.rounds))
        rows.append({"by": by, "number": number, "seconds": seconds})
        print(f"growth: {number:4} {by:14} {seconds:8.2f} s", flush=True)

    decompose(model, prompts(2, 1))  # warm up
    for part in (1, 2, 3, 4):
        measure("queries", sizes.queries * part, model, sizes.shots // 2, sizes.queries * part)
    for part in (1, 2, 3, 4):
        measure("demonstrations", sizes.shots * part, model, sizes.shots * part, 1)
    for n_layers in (6, 12, 18, 24):
        smaller = random_llama(n_layers, model)
        decompose(smaller, prompts(2, 1))
        measure("layers", n_layers, smaller, sizes.shots, 1)
    return rows


def random_llama(n_layers: int, like: Any) -> Any:
    """A Llama of SmolLM2's sizes with random weights and another number of layers."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaopt_lens import wrap

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=n_layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=4096, attn_implementation="eager", tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = LlamaForCausalLM(config).eval()
        bridge = TransformerBridge.boot_transformers(
            like.host.cfg.model_name, hf_model=source, tokenizer=like.tokenizer, device="cpu"
        )
    return wrap(bridge.eval())


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Three small charts side by side, as SVG: seconds against a number, with the line through the origin's side."""
    width, height, margin = 220, 150, 42
    parts = []
    for column, by in enumerate(("queries", "demonstrations", "layers")):
        points = [(row["number"], row["seconds"]) for row in rows if row["by"] == by]
        x_end, y_end = max(p[0] for p in points), max(p[1] for p in points) * 1.1
        left = column * (width + margin) + margin

        def place(x: float, y: float, left: int = left, x_end: float = x_end, y_end: float = y_end) -> str:
            return f"{left + width * x / x_end:.1f},{20 + height * (1 - y / y_end):.1f}"

        line = " ".join(place(x, y) for x, y in points)
        dots = "".join(
            f'<circle cx="{at[0]}" cy="{at[1]}" r="3" fill="#2c6fbb"/>'
            for at in (place(x, y).split(",") for x, y in points)
        )
        ticks = "".join(
            f'<text x="{place(x, 0).split(",")[0]}" y="{height + 36}" text-anchor="middle">{x}</text>'
            for x, _ in points
        )
        parts.append(
            f'<polyline points="{place(0, y_end)} {place(0, 0)} {place(x_end, 0)}" fill="none" stroke="#888"/>'
            f'<polyline points="{line}" fill="none" stroke="#2c6fbb" stroke-width="2"/>{dots}{ticks}'
            f'<text x="{left - 6}" y="30" text-anchor="end">{y_end:.1f} s</text>'
            f'<text x="{left + width / 2}" y="{height + 56}" text-anchor="middle">{by}</text>'
        )
    size = f'width="{3 * (width + margin) + 20}" height="{height + 66}"'
    style = 'font-family="sans-serif" font-size="12" fill="#444"'
    body = f'<rect width="100%" height="100%" fill="white"/><g {style}>{"".join(parts)}</g>'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>\n')


def fresh_memory(options: argparse.Namespace) -> dict[str, Any]:
    """`bench_memory` in a process of its own."""
    command = [sys.executable, __file__, "--model", options.model, "--shots", str(options.shots), "--worker"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"memory: decompose, {options.shots} shots: {found['peak']:.0f} MiB above the loaded model", flush=True)
    return found


def missed(part: str, found: Any, model: str) -> str | None:
    """The target that was not met, in words."""
    target = MAX.get(part)
    limit = target.get(model) if isinstance(target, dict) else target
    value = found["peak" if part == "memory" else "ratio"] if limit is not None else None
    return f"{part}: {value:.3g}, at most {limit}" if value is not None and value > limit else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3-270m, or what load_model takes")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shots", type=int, default=32)
    parser.add_argument("--queries", type=int, default=16, help="the smallest number in the growth")
    parser.add_argument("--compared", type=int, default=48, help="queries of compare")
    parser.add_argument("--head-queries", type=int, default=8)
    parser.add_argument("--sample", type=int, default=6, help="layers whose whole passes are timed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the growth here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    import metaopt_lens

    torch.set_num_threads(options.threads)
    asked = options.parts.split(",")
    if unknown := set(asked) - set(PARTS):
        parser.error(f"there are no parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    sizes = Sizes(
        options.shots, options.queries, options.compared, options.head_queries, options.sample, options.rounds
    )
    model = metaopt_lens.wrap(metaopt_lens.load_model(options.model))
    if options.worker:
        print(json.dumps(bench_memory(model, sizes)))
        return 0
    kinds: dict[str, Callable[[], Any]] = {
        "decompose": lambda: bench_decompose(model, sizes),
        "says": lambda: bench_says(model, sizes),
        "memory": lambda: fresh_memory(options),
        "compare": lambda: bench_compare(model, sizes),
        "heads": lambda: bench_heads(model, sizes),
        "growth": lambda: bench_growth(model, sizes),
    }
    found = {part: kinds[part]() for part in PARTS if part in asked}
    if options.json is not None:
        options.json.write_text(json.dumps(vars(options) | {"figures": found}, indent=1, default=str) + "\n")
    if options.plot is not None and "growth" in found:
        plot(found["growth"], options.plot)
    misses = [text for part in found if (text := missed(part, found[part], options.model)) is not None]
    print("\n".join(["MISSED " + text for text in misses] or ["all targets met"]))
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
