"""What each piece of a run computes, and how it is stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metaopt_lens._errors import FileFormatError, MetaoptLensError
from metaopt_lens._storage import provenance, write_text
from metaopt_lens.analysis import (
    UNRELATED_TEXT,
    Comparison,
    Controls,
    Convention,
    Finetuning,
    LabelFollowing,
    Measures,
    compare,
    follow_labels,
)
from metaopt_lens.decomposition import Decomposition, decompose
from metaopt_lens.experiments._prompt_set import PromptSet
from metaopt_lens.experiments._run_config import Rule, RunConfig
from metaopt_lens.finetuning import LearningRateChoice, choose_learning_rate
from metaopt_lens.models import LensModel
from metaopt_lens.runs import tokenize_for

Spent = Callable[[Mapping[str, float]], object]
Save = Callable[[Path], object]  # fills the folder of a piece


def write_json(path: Path, body: Any) -> None:
    """JSON in the one form used for pieces."""
    write_text(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        FileFormatError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read ({error}).") from None


def save_prompts(prompts: PromptSet) -> Save:
    """The piece ``prompts``."""
    return lambda folder: write_json(folder / "prompts.json", prompts.to_dict())


def learning_rate(config: RunConfig, model: LensModel, prompts: PromptSet, rule: Rule) -> Save:
    """The piece ``lr-RULE``: the learning rate with which finetuning does best on the held-out rows."""
    choice = choose_learning_rate(
        model,
        prompts.prompts[0],
        prompts.held_out,
        search="refined",
        candidates=prompts.words,
        epochs=config.epochs,
        layer_causal=rule == "lcgd",
        prepend_bos=config.prepend_bos,
        allow_processed=config.allow_processed,
    )
    return lambda folder: write_json(folder / "learning_rate.json", dataclasses.asdict(choice))


def load_learning_rate(folder: Path) -> LearningRateChoice:
    """Read a piece ``lr-RULE``."""
    body = read_json(folder / "learning_rate.json")
    for name in ("rates", "accuracy", "loss"):
        body[name] = tuple(body[name])
    return LearningRateChoice(**body)


def comparison(
    config: RunConfig, model: LensModel, prompts: PromptSet, rule: Rule, lr: float, seed: int, *, spent: Spent
) -> Save:
    """The piece ``RULE``: finetuning, and its comparison with the in-context runs; `spent` gets their costs."""
    found = compare(
        model,
        prompts.prompts,
        controls=_controls(config, prompts),
        finetuning=Finetuning(lr=lr, epochs=config.epochs, layer_causal=rule == "lcgd"),
        measures=Measures(
            subspace_dim=min(config.subspace_dim, model.info.d_head),
            scoring=config.scoring,
            convention=Convention.PUBLISHED if config.reference else Convention.DEFAULT,
        ),
        prepend_bos=config.prepend_bos,
        allow_processed=config.allow_processed,
        batch_size=config.batch_size,
        seed=seed,
        progress=False,
    )
    spent(found.seconds)
    (update,) = found.updates
    found = dataclasses.replace(found, provenance=versions())

    def save(folder: Path) -> None:
        found.save(folder / "comparison")
        write_json(folder / "finetuning.json", {"lr": lr, "losses": list(update.losses), "notes": list(found.notes)})
        if config.save_updates:
            dataclasses.replace(update, provenance=versions()).save(folder / "update")

    return save


def _controls(config: RunConfig, prompts: PromptSet) -> Controls:
    """Those of the preset, but for what the configuration says itself."""
    said = {
        "shuffled_labels": config.n_label_draws,
        "unrelated_text": config.unrelated,
        "random_weights": config.random_weights,
        "further": config.further,
    }
    changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    asked = dataclasses.replace(Controls.of(config.controls), n_null_draws=config.n_null_draws, **changes)
    own = asked.unrelated_text and bool(prompts.unrelated)
    return dataclasses.replace(asked, texts={UNRELATED_TEXT: prompts.unrelated}) if own else asked


def label_following(config: RunConfig, model: LensModel, prompts: PromptSet, seed: int) -> Save:
    """The piece ``labels``: who follows the demonstrations' words, next to natural ones; without unseen labels."""
    shown = {demo.label for demo in prompts.natural_prompts[0].demos}
    found = follow_labels(
        model,
        [prompt for prompt in prompts.natural_prompts if prompt.label in shown],
        labels=("natural", config.labels),
        shown_as=prompts.shown_as,
        epochs=config.epochs,
        scoring=config.scoring,
        prepend_bos=config.prepend_bos,
        allow_processed=config.allow_processed,
        batch_size=config.batch_size,
        seed=seed,
    )
    return lambda folder: found.save(folder / "following")


def load_following(folder: Path) -> LabelFollowing:
    """Read a piece ``labels``."""
    return LabelFollowing.load(folder / "following")


def versions() -> dict[str, Any]:
    """Versions without the time, so that equal runs give equal bytes."""
    return {name: value for name, value in provenance().items() if name != "created"}


def load_comparison(folder: Path) -> Comparison:
    """Read the comparison of a piece ``RULE``."""
    return Comparison.load(folder / "comparison")


def explain(error: MetaoptLensError, where: str) -> MetaoptLensError:
    """The same error, saying where in the run it came up."""
    return type(error)(f"{where}: {error}")


_EXAMPLE_BYTES = 64 * 2**20  # keys and values of a long prompt in a large model are not worth storing for a picture


def example(config: RunConfig, model: LensModel, prompts: PromptSet) -> Save:
    """The piece ``example``: the first prompt decomposed, for the report's views; nothing if it is too large."""
    first = prompts.prompts[0]
    n_tokens = tokenize_for(model, first, prepend_bos=config.prepend_bos).n_tokens
    info = model.info
    size = 2 * 4 * info.n_layers * n_tokens * info.n_kv_heads * info.d_head
    if size > _EXAMPLE_BYTES:
        return lambda folder: write_json(folder / "example.json", {"left_out": f"about {size >> 20} MiB"})
    found = dataclasses.replace(decompose(model, first, prepend_bos=config.prepend_bos), provenance=versions())
    return lambda folder: found.save(folder / "decomposition")


def load_example(folder: Path) -> Decomposition | None:
    """Read a piece ``example``; None if it was left out."""
    return Decomposition.load(folder / "decomposition") if (folder / "decomposition.json").is_file() else None
