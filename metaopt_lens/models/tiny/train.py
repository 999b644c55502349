"""Train the bundled model from a seed: ``python -m metaopt_lens.models.tiny.train --seed 0 --out DIR``.

The task cannot be solved from memory: every sequence binds labels to categories in its own way. Two things make
it learnable in minutes on one core: rotary positions, and a curriculum from one noun a category (where
copying an earlier label is enough) to all of them (where the model must know which nouns belong together).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor

from metaopt_lens._storage import atomic_path, write_text
from metaopt_lens._threads import torch_threads
from metaopt_lens.models.tiny._evaluate import measure
from metaopt_lens.models.tiny._load import model_config
from metaopt_lens.models.tiny._sampling import sample_stream
from metaopt_lens.models.tiny._tiny_files import METRICS_FILE, WEIGHTS_FILE
from metaopt_lens.models.tiny._vocabulary import BOS, ID_OF, LABELS, build_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_MARKS = (":", ":", ":", "->")  # one sequence in four is written with an arrow
_LABEL_OFFSET = 3  # BOS, then four tokens an item: noun, mark, label, newline


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the run that made the shipped weights."""

    seed: int = 0
    steps: int = 4000
    batch: int = 128
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.01
    n_items: tuple[int, int] = (12, 24)
    n_categories: tuple[int, int] = (2, 4)
    curriculum: tuple[float, float] = (0.1, 0.5)
    """One noun a category until the first fraction of the steps, all twelve from the second on."""
    text_weight: float = 0.1
    """Weight of the loss on all other tokens: that nouns of one category occur together is a lesson too."""


def n_nouns_at(step: int, config: TrainConfig) -> int:
    """How many nouns of each category the curriculum has reached."""
    start, stop = config.curriculum
    progress = (step / config.steps - start) / (stop - start)
    return 1 + round(11 * min(max(progress, 0.0), 1.0))


def make_batch(
    rng: random.Random, step: int, config: TrainConfig
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch demo"]]:
    """Token ids of one batch, and for each label in it 1 if its category occurred before, else 0."""
    n_items, n_nouns = rng.randint(*config.n_items), n_nouns_at(step, config)
    rows, known = [], []
    for _ in range(config.batch):
        stream = sample_stream(rng, n_items=n_items, n_categories=rng.randint(*config.n_categories), n_nouns=n_nouns)
        mark, row, seen = ID_OF[rng.choice(_MARKS)], [BOS], set[str]()
        flags = []
        for noun, label in stream:
            row += (ID_OF[noun], mark, ID_OF[label], ID_OF["\n"])
            flags.append(int(label in seen))
            seen.add(label)
        rows.append(row)
        known.append(flags)
    return torch.tensor(rows), torch.tensor(known)


def loss_of(
    logits: Float[Tensor, "batch pos vocab"],
    ids: Int[Tensor, "batch pos"],
    known: Int[Tensor, "batch demo"],
    text_weight: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss trained on, and its part on labels that the sequence determines.

    A category's first label cannot be known, so its target is uniform over all labels. Learning from the
    label that happens to stand there would teach which pairs are held out, and give zero-shot preferences.
    """
    log_p = logits[:, :-1].float().log_softmax(-1)
    target = ids[:, 1:]
    nll = -log_p.gather(-1, target[..., None])[..., 0]  # batch pos
    at_label = slice(_LABEL_OFFSET - 1, None, 4)
    told = known.float()
    first, last = ID_OF[LABELS[0]], ID_OF[LABELS[-1]]
    uniform = -log_p[:, at_label, first : last + 1].mean(-1)
    label_nll = nll[:, at_label]
    determined = (label_nll * told).sum() / told.sum()
    undetermined = (uniform * (1 - told)).sum() / (1 - told).sum()
    text = (nll.sum() - label_nll.sum()) / (nll.numel() - label_nll.numel())
    return determined + 0.1 * undetermined + text_weight * text, determined.detach()


def train(config: TrainConfig, *, progress: bool = False) -> tuple[LlamaForCausalLM, list[float]]:
    """Train from scratch; returns the model in eval mode and the determined-label loss of every step.

    Deterministic for equal configurations on one machine: it runs on the CPU with one thread.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import LlamaForCausalLM

    with torch_threads(1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = LlamaForCausalLM(model_config(attention="sdpa"))
            model.init_weights()
        rng = random.Random(config.seed)
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
        losses: list[float] = []
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), disable=not progress) as bar:
            task = bar.add_task("training", total=config.steps, note="")
            model.train()
            for step in range(config.steps):
                warm = min(1.0, (step + 1) / config.warmup)
                cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * warm * cosine
                ids, known = make_batch(rng, step, config)
                logits = model(input_ids=ids, use_cache=False).logits
                loss, determined = loss_of(logits, ids, known, config.text_weight)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(determined.item())
                recent = losses[-50:]
                note = f"nouns {n_nouns_at(step, config)}  label loss {sum(recent) / len(recent):.3f}"
                bar.update(task, advance=1, note=note)
        return model.eval(), losses


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write weights, configuration and tokenizer into the folder `out`."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().float().contiguous() for name, t in model.state_dict().items()}
    with atomic_path(out / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    model_config().save_pretrained(out)
    build_tokenizer().save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model into.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = TrainConfig.steps,
) -> None:
    """Train the bundled model on one CPU core and write it with its measured accuracies."""
    config = TrainConfig(seed=seed, steps=steps)
    began = time.perf_counter()
    model, losses = train(config, progress=True)
    seconds = time.perf_counter() - began
    save(model, out)
    metrics = {
        "weights_sha256": hashlib.sha256((out / WEIGHTS_FILE).read_bytes()).hexdigest(),
        "seed": seed,
        "steps": steps,
        "training_seconds": round(seconds),
        "last_label_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "accuracy": measure(model),
    }
    text = json.dumps(metrics, indent=1)
    write_text(out / METRICS_FILE, text + "\n")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
