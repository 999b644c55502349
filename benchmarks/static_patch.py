"""One patch for all queries on a pretrained model: does it beat zero-shot on queries it was not fitted on?

    python benchmarks/static_patch.py --rows pairs.jsonl                   # a line: {"input": ..., "output": ...}
    python benchmarks/static_patch.py --rows pairs.jsonl --sets 5 --demos 10 --fit 2,8,32 --ridge 0.01,0.1,1

Each demonstration set has demonstrations, fitting and held-out queries of its own, drawn at random; no row is in
two of the three. An answer is right if the first token of the right label has a better score than those of the
demonstrations' labels. Rows whose label begins with the same token as another label are left out. The table has means
over sets with 95 % t intervals over sets, the gain over zero-shot being paired query by query.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

Pair = tuple[str, str]


def usable(rows: list[Pair], model: Any) -> list[Pair]:
    """Rows that can be told apart by the first tokens of their labels; no input twice."""
    from metaopt_lens.prompts import Template, tokenize_label

    def first(label: str) -> int:
        return tokenize_label(label, Template(), model.tokenizer)[0]

    count = Counter(first(label) for label in {label for _, label in rows})
    return list({word: (word, label) for word, label in rows if count[first(label)] == 1}.values())


def one_set(model: Any, rows: list[Pair], seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What every setting reaches behind one demonstration set."""
    from metaopt_lens import ICLPrompt
    from metaopt_lens.analysis import static_curve

    n_fit, n_demos = max(arguments.fit), arguments.demos
    drawn = random.Random(seed).sample(rows, n_demos + n_fit + arguments.held_out)
    demos = drawn[:n_demos]
    labels = list(dict.fromkeys(label for _, label in demos))

    def asked(some: list[Pair]) -> list[Any]:
        return [
            ICLPrompt(demos, word, label=label, candidates=list(dict.fromkeys([*labels, label])))
            for word, label in some
        ]

    fitted, held_out = asked(drawn[n_demos : n_demos + n_fit]), asked(drawn[n_demos + n_fit :])
    found = []
    for ridge in arguments.ridge:
        curve = static_curve(model, fitted, held_out, n_fit=arguments.fit, ridge=ridge)
        gains = (curve.correct.double() - curve.correct[1].double()).mean(1)
        for number, row in enumerate(curve.to_frame().to_dict("records")):
            if number < 2 and ridge != arguments.ridge[0]:
                continue  # in context and zero-shot have no ridge
            key = (row["setting"], "" if number < 2 else f"{ridge:g}")
            kl = row["kl_to_in_context"]
            found.append({"key": key, "accuracy": row["accuracy"], "gain": float(gains[number]), "kl": kl})
    return found


def main() -> None:
    """Measure every set, then write the table."""
    import torch

    import metaopt_lens as ml
    from metaopt_lens.analysis import mean_interval

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--demos", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--fit", type=lambda text: [int(k) for k in text.split(",")], default=[2, 8, 32])
    parser.add_argument("--ridge", type=lambda text: [float(r) for r in text.split(",")], default=[0.01, 0.1, 1.0])
    arguments = parser.parse_args()
    read = [json.loads(line) for line in arguments.rows.read_text("utf-8").splitlines()]
    model = ml.load_model(arguments.model, device="cpu")
    pairs = [(row["input"], row["output"]) for row in read]
    rows = pairs if len({label for _, label in pairs}) < arguments.demos else usable(pairs, model)
    print(f"{arguments.rows.stem}: {len(rows)} of {len(read)} rows", flush=True)
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in range(arguments.sets):
        for row in one_set(model, rows, seed, arguments):
            measured.setdefault(row["key"], []).append(row)
        print(f"set {seed} done", flush=True)

    def written(rows: list[dict[str, Any]], name: str, spec: str) -> str:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        mean = mean_interval(values, sets=torch.arange(len(values)))
        if bool(mean.low.isnan()):
            return f"{float(mean.estimate):{spec}}"
        return f"{float(mean.estimate):{spec}} ({float(mean.low):{spec}} to {float(mean.high):{spec}})"

    print("| setting | ridge | accuracy | gain over zero-shot | KL from in context, nats |\n|---|---|---|---|---|")
    for (setting, ridge), of_sets in measured.items():
        cells = [written(of_sets, name, spec) for name, spec in (("accuracy", ".2f"), ("gain", "+.2f"), ("kl", ".2f"))]
        print(f"| {setting} | {ridge} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
