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


def one_set(model: Any, rows: list[Pair], seed: int, arguments: argparse.Namespace) -> dict[float, Any]:
    """The static curve of every ridge behind one demonstration set."""
    from metaopt_lens import ICLPrompt
    from metaopt_lens.analysis import static_curve
    from metaopt_lens.patches import exact_patches

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
    patches = exact_patches(model, fitted, prepend_bos=arguments.bos)
    return {
        ridge: static_curve(
            model, fitted, held_out, n_fit=arguments.fit, ridge=ridge, patches=patches, prepend_bos=arguments.bos
        )
        for ridge in arguments.ridge
    }


def main() -> None:
    """Measure every set, then write the table."""
    import metaopt_lens as ml
    from metaopt_lens.analysis import StaticCurves

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--demos", type=int, default=10)
    parser.add_argument("--bos", action="store_true", default=None, help="put BOS first, whatever the model's default")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--fit", type=lambda text: [int(k) for k in text.split(",")], default=[2, 8, 32])
    parser.add_argument("--ridge", type=lambda text: [float(r) for r in text.split(",")], default=[0.01, 0.1, 1.0])
    arguments = parser.parse_args()
    read = [json.loads(line) for line in arguments.rows.read_text("utf-8").splitlines()]
    model = ml.load_model(arguments.model, device="cpu")
    pairs = [(row["input"], row["output"]) for row in read]
    rows = pairs if len({label for _, label in pairs}) < arguments.demos else usable(pairs, model)
    print(f"{arguments.rows.stem}: {len(rows)} of {len(read)} rows", flush=True)
    curves: dict[float, list[Any]] = {ridge: [] for ridge in arguments.ridge}
    for seed in range(arguments.sets):
        for ridge, curve in one_set(model, rows, seed, arguments).items():
            curves[ridge].append(curve)
        print(f"set {seed} done", flush=True)
    print("| setting | ridge | accuracy | gain over zero-shot | KL from in context, nats |\n|---|---|---|---|---|")
    for number, (ridge, of_sets) in enumerate(curves.items()):
        joined = StaticCurves(tuple(of_sets))
        for i, row in enumerate(joined.to_frame().to_dict("records")):
            if i >= 2 or number == 0:  # in context and zero-shot have no ridge
                columns = (("accuracy", ".2f"), ("gain", "+.2f"), ("kl_to_in_context", ".2f"))
                cells = [written(row, *column) for column in columns]
                print(f"| {row['setting']} | {f'{ridge:g}' if i >= 2 else ''} | {' | '.join(cells)} |", flush=True)
        print(f"ridge {ridge:g}: {joined.sentence}")


def written(row: dict[str, Any], key: str, form: str) -> str:
    """A number with its interval."""
    value, low, high = (row[name] for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value:{form}}" if low != low else f"{value:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
