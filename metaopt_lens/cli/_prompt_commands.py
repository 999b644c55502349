"""Commands on prompts: ``demo``, ``decompose`` and ``compare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from metaopt_lens._threads import torch_threads
from metaopt_lens._types import HeadRef
from metaopt_lens.cli import _options as options
from metaopt_lens.cli._showing import say_written, show_comparison, show_decomposition, show_json

_DEMO_LR = 0.02
_OUT = Path("metaopt-lens-out")


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for heads.csv, heads.json and report.html.", metavar="DIR")
    ] = _OUT,
    top: options.Top = 12,
) -> None:
    """The bundled model on a bundled prompt: needs no network and takes seconds."""
    import random

    from metaopt_lens.analysis import Finetuning
    from metaopt_lens.analysis import compare as compare_updates
    from metaopt_lens.experiments import episode_prompts
    from metaopt_lens.models import load_model
    from metaopt_lens.models.tiny import sample_episode
    from metaopt_lens.prompts import ICLPrompt
    from metaopt_lens.viz import write_comparison_outputs

    # The bundled model is so small that more threads only wait for each other, the longer the busier the machine.
    with torch_threads(1):
        episode = sample_episode(random.Random(3), n_demos=8, n_categories=2)
        prompt = ICLPrompt(episode.demos, episode.query, label=episode.answer, candidates=episode.candidates)
        model = load_model("tiny")
        _decompose(model, [prompt], None, (None, None), form=options.Format.table, out=out, top=top)
        found = compare_updates(model, episode_prompts(episode), finetuning=Finetuning(lr=_DEMO_LR), progress=False)
        show_comparison(found)
        say_written(write_comparison_outputs(found, out).values())


def decompose(
    model: options.Model,
    prompt: Annotated[
        Path | None, typer.Option("--prompt", help="Prompts: a .json, .jsonl or text file.", metavar="FILE")
    ] = None,
    context: Annotated[
        Path | None,
        typer.Option("--context", help="A text, read chunk by chunk; with --query.", metavar="FILE"),
    ] = None,
    query: Annotated[
        str | None, typer.Option("--query", help="What stands behind the context.", metavar="TEXT")
    ] = None,
    chunks: Annotated[str, typer.Option(help="How to cut the context: sentence, line or paragraph.")] = "sentence",
    dtype: options.WeightsType = options.DType.float32,
    device: options.Device = None,
    heads: Annotated[str | None, typer.Option(help="Only these heads, such as L1H2,L3H7.")] = None,
    position: Annotated[
        str, typer.Option(help="Token of the query to read: last, all, or an index into the prompt.")
    ] = "last",
    form: options.Form = options.Format.table,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write heads.csv, heads.json and report.html here.", metavar="DIR"),
    ] = None,
    prepend_bos: options.PrependBos = None,
    answer: Annotated[
        str | None,
        typer.Option(help="Decompose this word's logit; by default the prompt's label.", metavar="WORD"),
    ] = None,
    versus: Annotated[
        str | None,
        typer.Option(help="Minus the mean logit of these words; by default the other candidates.", metavar="WORD,WORD"),
    ] = None,
    top: options.Top = 20,
    no_cache: options.NoCache = False,
) -> None:
    """Split the heads of a model on the prompts in a file."""
    chosen = [HeadRef.parse(name) for name in heads.split(",")] if heads is not None else None
    where = options.position(position)

    prompts = _asked_prompts(prompt, context, query, chunks)  # before the model, which takes longer
    loaded = options.load(model, dtype, device, no_cache=no_cache)
    for ref in chosen or ():
        ref.check(loaded.info.n_layers, loaded.info.n_heads)
    asked = (answer, None if versus is None else [word.strip() for word in versus.split(",")])
    _decompose(loaded, prompts, chosen, asked, form=form, out=out, top=top, position=where, prepend_bos=prepend_bos)


def _asked_prompts(prompt: Path | None, context: Path | None, query: str | None, chunks: str) -> Sequence[Any]:
    """Prompts out of a file, or a context with its query."""
    from metaopt_lens._errors import OptionError, PromptError
    from metaopt_lens.prompts import ContextPrompt, load_prompts

    if (prompt is None) == (context is None) or (context is None) != (query is None):
        raise OptionError("give --prompt FILE, or --context FILE with --query TEXT.")
    if prompt is not None:
        return load_prompts(prompt)
    assert context is not None
    assert query is not None
    try:
        text = context.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read {context}: {error}.") from None
    return [ContextPrompt(text, query, chunks=chunks)]


def _decompose(
    model: Any,
    prompts: Sequence[Any],
    heads: list[HeadRef] | None,
    asked: tuple[str | None, list[str] | None],
    *,
    form: options.Format,
    out: Path | None,
    top: int,
    **how: Any,
) -> None:
    """What `demo` and `decompose` share: split, predict, show, write."""
    from metaopt_lens.decomposition import decompose as split
    from metaopt_lens.viz import as_data, write_outputs

    found = split(model, prompts, **how)
    answer, versus = asked
    said = [item.logits(answer, versus=versus) for item in found if answer is not None or item.prompt.label is not None]
    result, answers = found[0] if len(found) == 1 else found, [item.predict() for item in found]
    if form is options.Format.json:
        show_json(as_data(result, answers, heads=heads))
    else:
        show_decomposition(result, answers, heads=heads, top=top, said=said)
    if out is not None:
        written = write_outputs(result, out, heads=heads, answers=answers, answer=answer, versus=versus)
        say_written(written, to_stderr=form is options.Format.json)


def compare(
    model: options.Model,
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            help="Prompts: a .json, .jsonl or text file; at least two queries for each set of demonstrations.",
        ),
    ],
    lr: options.Rate = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the demonstrations.")] = 1,
    layer_causal: Annotated[
        bool, typer.Option("--layer-causal", help="Every layer learns from its own early exit (arXiv:2311.07772).")
    ] = False,
    controls: options.ControlsPreset = None,
    unrelated: Annotated[
        Path | None, typer.Option(help="Text file, one text per line, for the control that learns something else.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Also run everything on permuted weights.")
    ] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Metrics with the published code's choices.")] = False,
    dtype: options.WeightsType = options.DType.float32,
    device: options.Device = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    form: options.Form = options.Format.table,
    out: Annotated[Path, typer.Option("--out", help="Folder for comparison.csv, .json and .html.")] = _OUT,
    no_cache: options.NoCache = False,
) -> None:
    """Finetune on the demonstrations and compare with in-context learning, head by head."""
    rate = options.learning_rate(lr)

    from metaopt_lens.prompts import load_prompts

    loaded_prompts = load_prompts(prompts)  # before the model, which takes longer
    texts = None if unrelated is None else options.lines(unrelated)

    from metaopt_lens.analysis import UNRELATED_TEXT, Controls, Convention, Finetuning, Measures
    from metaopt_lens.analysis import compare as compare_updates
    from metaopt_lens.viz import comparison_data, write_comparison_outputs

    asked = Controls.of("standard" if controls is None else controls.value)
    asked = dataclasses.replace(
        asked,
        random_weights=random_weights or asked.random_weights,
        texts={} if texts is None else {UNRELATED_TEXT: texts},
    )
    found = compare_updates(
        options.load(model, dtype, device, no_cache=no_cache),
        loaded_prompts,
        controls=asked,
        finetuning=Finetuning(lr=rate, epochs=epochs, layer_causal=layer_causal),
        measures=Measures(convention=Convention.PUBLISHED if reference else Convention.DEFAULT),
        batch_size=batch_size,
        seed=seed,
    )
    if form is options.Format.json:
        show_json(comparison_data(found))
    else:
        show_comparison(found)
    written = write_comparison_outputs(found, out).values()
    say_written(written, to_stderr=form is options.Format.json)
