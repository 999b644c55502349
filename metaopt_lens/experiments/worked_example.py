"""The worked result on the bundled model: is its in-context learning a hidden gradient descent?

python -m metaopt_lens.experiments.worked_example --out docs/results-bundled.md
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from metaopt_lens._storage import write_text
from metaopt_lens.analysis import (
    SHUFFLED_LABELS,
    Comparison,
    Controls,
    Finetuning,
    Measured,
    compare,
    findings,
    headline,
)
from metaopt_lens.experiments._episode_prompts import episode_prompts
from metaopt_lens.finetuning import choose_learning_rate
from metaopt_lens.models import load_model, wrap
from metaopt_lens.models.tiny import CATEGORIES, CATEGORY_OF, LABELS, Episode, sample_episodes
from metaopt_lens.prompts import ICLPrompt

if TYPE_CHECKING:
    import pandas as pd

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
METHODS: dict[str, dict[str, Any]] = {"gradient descent": {}, "layer-causal": {"layer_causal": True}}
_CONTROLS = (
    "other query",
    "shuffled labels",
    "flipped labels",
    "other task",
    "unrelated words",
    "random weights",
    "random weights, trained embeddings",
)


@dataclass(frozen=True)
class RateSearch:
    """Mean accuracy and loss of each learning rate over the tuning sets, on demonstrations held out of them."""

    rates: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    base_accuracy: float

    @property
    def lr(self) -> float:
        """The rate of the highest accuracy; ties go to the lower loss."""
        usable = [i for i in range(len(self.rates)) if self.loss[i] == self.loss[i]]
        return self.rates[min(usable, key=lambda i: (-self.accuracy[i], self.loss[i]))]


@dataclass(frozen=True)
class WorkedExample:
    """One finetuning method against in-context learning on the bundled model."""

    method: str
    search: RateSearch
    comparison: Comparison


def draw_prompts(n_sets: int, n_queries: int, *, n_demos: int, seed: int) -> list[list[ICLPrompt]]:
    """Demonstration sets of 2, 3 and 4 categories in turn, held-out pairs only, each with queries it does not show."""
    rng = random.Random(seed)
    sets = []
    for index in range(n_sets):
        episode = sample_episodes(n=1, n_demos=n_demos, n_categories=2 + index % 3, seed=rng.randrange(2**31))[0]
        sets.append(rng.sample(episode_prompts(episode), n_queries))
    return sets


def search_rate(model: Any, episodes: Sequence[Episode], settings: dict[str, Any]) -> RateSearch:
    """Try every rate on sets of their own, judged on nouns that are not demonstrated there."""
    choices = [
        choose_learning_rate(
            model,
            episode.demos,
            [(p.query, p.label or "") for p in episode_prompts(episode)],
            rates=RATES,
            candidates=episode.candidates,
            **settings,
        )
        for episode in episodes
    ]

    def mean(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
        return tuple(sum(column) / len(values) for column in zip(*values, strict=True))

    return RateSearch(
        rates=RATES,
        accuracy=mean([c.accuracy for c in choices]),
        loss=mean([c.loss for c in choices]),
        base_accuracy=sum(c.base_accuracy for c in choices) / len(choices),
    )


def other_task(prompt: ICLPrompt, seed: int) -> list[str]:
    """Texts in the demonstrations' form: nouns of other categories with other labels."""
    rng = random.Random(seed)
    used = {CATEGORY_OF[demo.input] for demo in prompt.demos}
    categories = rng.sample([c for c in CATEGORIES if c not in used], len(prompt.candidates or ()))
    labels = rng.sample([label for label in LABELS if label not in (prompt.candidates or ())], len(categories))
    pairs = [rng.randrange(len(categories)) for _ in prompt.demos]
    return [f"{rng.choice(CATEGORIES[categories[i]])} : {labels[i]}" for i in pairs]


def unrelated_words(prompt: ICLPrompt, seed: int) -> list[str]:
    """Nouns of all categories in random order: text with nothing to learn."""
    rng = random.Random(seed)
    nouns = [noun for nouns in CATEGORIES.values() for noun in nouns]
    return [" ".join(rng.sample(nouns, 3)) for _ in prompt.demos]


def run(
    *, n_sets: int = 25, n_queries: int = 8, n_demos: int = 16, n_tuning: int = 6, seed: int = 0, progress: bool = True
) -> list[WorkedExample]:
    """Choose learning rates, finetune on every set and compare, for ordinary and layer-causal gradient descent."""
    model = wrap(load_model("tiny"))
    sets = draw_prompts(n_sets, n_queries, n_demos=n_demos, seed=seed)
    tuning = [
        sample_episodes(n=1, n_demos=n_demos, n_categories=2 + i % 3, seed=10_000 + seed + i)[0]
        for i in range(n_tuning)
    ]
    results = []
    for method, settings in METHODS.items():
        search = search_rate(model, tuning, settings)
        texts = {
            name: [draw(group[0], seed + i) for i, group in enumerate(sets)]
            for name, draw in (("other task", other_task), ("unrelated words", unrelated_words))
        }
        found = compare(
            model,
            [prompt for group in sets for prompt in group],
            controls=Controls(shuffled_labels=4, unrelated_text=False, random_weights=True, texts=texts),
            finetuning=Finetuning(lr=search.lr, **settings),
            seed=seed,
            progress=progress,
        )
        results.append(WorkedExample(method, search, found))
    return results


# ---- report -------------------------------------------------------------------------------------------------------


def excess_table(comparison: Comparison, names: Sequence[str]) -> pd.DataFrame:
    """Mean excess of a statistic (over heads and layers) over each of its nulls, with its interval over sets."""
    import pandas as pd

    rows = []
    for name in names:
        statistic = comparison[name]
        row = {"statistic": name, "value": _interval(comparison, statistic, statistic.values)}
        for null in _CONTROLS:
            if null in statistic.nulls:
                row[f"over {null}"] = _interval(comparison, statistic, statistic.values - statistic.nulls[null])
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def head_table(comparison: Comparison, name: str, null: str) -> pd.DataFrame:
    """Every head's value, null and excess, largest excess first; p from the sets, adjusted over the heads."""
    import dataclasses

    statistic = comparison[name]
    only = dataclasses.replace(statistic, nulls={null: statistic.nulls[null]})
    frame = dataclasses.replace(comparison, statistics=(only,)).to_frame()
    frame.insert(0, "head name", [f"L{a}H{b}" for a, b in zip(frame["layer"], frame["head"], strict=True)])
    return frame.sort_values("excess", ascending=False).reset_index(drop=True)


def to_markdown(results: Sequence[WorkedExample], *, seconds: float, command: str) -> str:
    """Tables of everything measured."""
    first = results[0].comparison
    versions = ", ".join(f"{name} {first.provenance[name]}" for name in ("transformer-lens", "transformers", "torch"))
    heading = (
        f"{len(first.sets)} queries behind {len(first.n_demos)} sets of {max(first.n_demos)} demonstrations; intervals "
        f"are 95 % t intervals {first.scope}. Made in {seconds:.0f} s by\n\n    {command}\n\nwith {versions}."
    )
    return "\n".join([heading, *(_section(result) for result in results)])


def _section(result: WorkedExample) -> str:
    import pandas as pd

    c = result.comparison
    recall = c.rec2ftp()
    search = result.search
    rates = pd.DataFrame({"learning rate": search.rates, "accuracy": search.accuracy, "loss": search.loss})
    summary = c.summary()
    nulls = [column for column in map(str, summary.columns) if column.startswith("null: ")]
    table = summary[["statistic", "value", "value_low", "value_high", *nulls]].astype(object)
    table = table.where(table.notna(), "")
    counts = summary[["statistic", "main_null", "significant", "of", "level", "undefined", "values"]]
    heads = head_table(c, "z total", SHUFFLED_LABELS)
    columns = ["head name", "value", f"null: {SHUFFLED_LABELS}", "excess", "excess_low", "excess_high", "p_adjusted"]
    answers = findings(c)
    said = pd.DataFrame({"question": [f.question for f in answers], "answer": [f.sentence for f in answers]})
    names = [s.name for s in c.statistics]
    parts = [
        f"\n## Measured: {result.method}\n",
        f"Learning rate {search.lr:g}, chosen on held-out demonstrations of other sets (zero-shot accuracy there "
        f"{search.base_accuracy:.3f}):\n",
        _markdown(rates),
        f"\n{headline(answers)}\n",
        _markdown(said),
        f"\nAccuracies and agreement of predictions; {c.settings['n_label_draws']} shuffles of the labels a set, and "
        "the accuracy behind flipped labels against the natural and against the flipped ones:\n",
        _markdown(c.accuracies()),
        f"\nRec2FTP {recall.text}, which is P(in-context right | zero-shot wrong); exact intervals that take queries "
        "as independent.\n",
        "\nMeans over layers and heads, and their nulls:\n",
        _markdown(table),
        "\nExcess over each null, [95 % interval]:\n",
        _markdown(excess_table(c, names)),
        "\nLayers or heads, of those that can be tested, that differ from the main null (t test over sets, "
        "Benjamini-Hochberg, 5 %), and undefined values, which are left out:\n",
        _markdown(counts),
        "\nHeads, `z total` against the same demonstrations with shuffled labels:\n",
        _markdown(heads[columns]),
    ]
    return "\n".join(parts)


def _interval(comparison: Comparison, statistic: Measured, values: torch.Tensor) -> str:
    """Mean over layers and heads with its interval; empty where nothing is defined."""
    found = comparison.statistic_interval(statistic, values.nanmean((1, 2)), level=0.95)
    if bool(found.estimate.isnan()):
        return ""
    interval = "no interval" if bool(found.degenerate) else f"{float(found.low):+.3f}, {float(found.high):+.3f}"
    return f"{float(found.estimate):+.3f} [{interval}]"


def _markdown(frame: pd.DataFrame) -> str:
    """A table; what is undefined, or an interval there is none of, says ``none``."""
    import pandas as pd

    def cell(value: Any) -> str:
        if pd.isna(value):
            return "none"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = [[cell(value) for value in row] for row in frame.itertuples(index=False)]
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run the worked example and write its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file to write; standard output if not given")
    parser.add_argument("--sets", type=int, default=25)
    parser.add_argument("--queries", type=int, default=8, help="queries behind each set, at most 8")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is tiny: threads would only wait for each other
    start = time.perf_counter()
    results = run(n_sets=arguments.sets, n_queries=arguments.queries, seed=arguments.seed)
    command = "python -m metaopt_lens.experiments.worked_example"
    text = to_markdown(results, seconds=time.perf_counter() - start, command=command) + "\n"
    if arguments.out:
        write_text(arguments.out, text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
