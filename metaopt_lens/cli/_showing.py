"""How results reach the terminal; what is in them is said by `metaopt_lens.viz`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from metaopt_lens.analysis import Comparison
    from metaopt_lens.decomposition import Decomposition, DecompositionSet, LogitContributions
    from metaopt_lens.experiments import CompiledPrompt, ExperimentResult
    from metaopt_lens.runs import LabelPrediction


def say(text: str, *, to_stderr: bool = False) -> None:
    """A line of text as it is, however long."""
    Console(stderr=to_stderr).print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Within it, lines of the library's log go to stderr, each with the time of day."""
    import logging

    log, handler = logging.getLogger("metaopt_lens"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def say_written(paths: Iterable[Path], *, to_stderr: bool = False) -> None:
    """What was written where."""
    for path in paths:
        say(f"wrote {path}", to_stderr=to_stderr)


def show_json(data: Any) -> None:
    """Plain data on stdout, to be piped."""
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))


def show_decomposition(
    result: Decomposition | DecompositionSet,
    answers: Sequence[LabelPrediction],
    *,
    heads: Any,
    top: int,
    said: Sequence[LogitContributions],
) -> None:
    """The prompt, what the model answers, what writes the answers, and the table of heads."""
    from metaopt_lens.viz import answers_text, decompositions, heads_text, labels_text, prompt_text

    console, items = Console(highlight=False), decompositions(result)
    say(repr(result))
    if len(items) == 1:
        console.print(prompt_text(items[0]), soft_wrap=True)
    notes = (note for item in items for note in (item.tokenized.bos_note, item.tokenized.warning))
    for note in dict.fromkeys(notes):
        if note:
            console.print(note, style="dim", markup=False, soft_wrap=True)
    console.print(labels_text(answers[0]) if len(items) == 1 else answers_text(items, answers))
    for contributions in said:
        console.print(repr(contributions), markup=False, soft_wrap=True)
    console.print(heads_text(result, heads=heads, top=top))


def show_comparison(found: Comparison) -> None:
    """Updates, predictions and similarities."""
    from metaopt_lens._errors import UndefinedMetricError
    from metaopt_lens.viz import accuracies_text, comparison_sentences, comparison_text

    console = Console(highlight=False)
    say(repr(found.updates[0]))
    if found.learning_rate is not None:
        choice = found.learning_rate
        console.print(f"learning rate {choice.lr:g}, the best of {list(choice.rates)} on held-out demonstrations")
    try:
        console.print(accuracies_text(found))
        for sentence in comparison_sentences(found):
            console.print(sentence, markup=False)
    except UndefinedMetricError as error:
        console.print(f"no predictions: {error}", markup=False)
    console.print(comparison_text(found))
    for note in found.notes:
        console.print(f"note: {note}", markup=False)


def show_compiled(found: CompiledPrompt) -> None:
    """The patch, how well it does what the context does, answers, norms and shares."""
    from metaopt_lens.viz import compiled_texts

    console = Console(highlight=False)
    say(repr(found.patch))
    say(found.sentence)
    for table in compiled_texts(found):
        console.print(table)
    for note in found.notes:
        say(note)


def show_run(result: ExperimentResult) -> None:
    """What a run found, in short."""
    from metaopt_lens.viz import run_sentences

    say(repr(result))
    for sentence in run_sentences(result):
        say(f"  {sentence}")
    say_written([result.path])
