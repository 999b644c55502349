"""train(): a small language model from scratch, resumable at any moment."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt_lens._errors import FileFormatError, ModelMismatchError, NonFiniteError
from metaopt_lens._storage import provenance, write_text
from metaopt_lens.training._checkpoint import (
    check_same_run,
    latest_checkpoint,
    restore,
    restore_random_state,
    save_checkpoint,
)
from metaopt_lens.training._corpora import Batch, Corpus, corpus_tokenizer, load_corpus
from metaopt_lens.training._evaluation import Evaluation, evaluate
from metaopt_lens.training._language_model import LanguageModel, build_model
from metaopt_lens.training._training_config import OptimizerSettings, TrainingConfig, differing_fields

RESULT = "result.json"
KIND = "momentum training run"


@dataclass(frozen=True)
class TrainedModel:
    """A finished run.

    Attributes:
        losses: of every step. history: evaluations on the way, by step. evaluation: at the end.
        eta: of every layer and head at the end; 0 for plain attention.
        seconds: spent in training steps, summed over all pieces of an interrupted run.
    """

    config: TrainingConfig
    losses: tuple[float, ...]
    history: dict[int, Evaluation]
    evaluation: Evaluation
    eta: tuple[tuple[float, ...], ...]
    seconds: float
    corpus: str

    def save(self, folder: Path) -> Path:
        """Write ``result.json``."""
        body = {
            "kind": KIND,
            "config": self.config.to_dict(),
            "losses": list(self.losses),
            "history": {str(step): found.to_dict() for step, found in self.history.items()},
            "evaluation": self.evaluation.to_dict(),
            "eta": [list(row) for row in self.eta],
            "seconds": self.seconds,
            "corpus": self.corpus,
            "provenance": provenance(),
        }
        return write_text(folder / RESULT, json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TrainedModel:
        """Read what `save` wrote.

        Raises:
            FileFormatError: there is no finished run, or its file is damaged.
        """
        file = Path(folder) / RESULT
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            if body["kind"] != KIND:
                raise KeyError("kind")
            return cls(
                config=TrainingConfig.from_dict(body["config"]),
                losses=tuple(body["losses"]),
                history={int(step): Evaluation.from_dict(found) for step, found in body["history"].items()},
                evaluation=Evaluation.from_dict(body["evaluation"]),
                eta=tuple(tuple(row) for row in body["eta"]),
                seconds=body["seconds"],
                corpus=body["corpus"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{file} is not the result of a finished training run ({error!r}).") from None


def train(
    config: TrainingConfig,
    folder: str | os.PathLike[str],
    *,
    corpus: Corpus | None = None,
    device: str | None = None,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainedModel:
    """Train a model from scratch, or go on where an interrupted run in `folder` stopped.

    On the CPU a run that was interrupted and resumed equals the uninterrupted one bit for bit (with the same number of
    threads). A finished run is read, not made again.

    Args:
        folder: of checkpoints and the result. corpus: loaded already; by default that of the configuration.
        device: CUDA if there is one. on_step: called after every step with its number.

    Raises:
        ModelMismatchError: the folder holds a run with another configuration (the message names the fields) or text.
        FileFormatError: its checkpoint is damaged or cut short.
        PromptError: the corpus is shorter than one context.
        NonFiniteError: the loss became NaN or infinite.
    """
    out = Path(folder)
    done = finished_run(config, out)
    if done is not None:
        return done
    checkpoint = latest_checkpoint(out)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_corpus(config) if corpus is None else corpus
    if checkpoint is not None:
        check_same_run(checkpoint, config, data.fingerprint)
    lm = build_model(config, n_vocab=data.n_vocab, tokenizer=data.tokenizer, device=where)
    optimizer = _optimizer(lm, config)
    losses, history, seconds, first = list[float](), dict[int, Evaluation](), 0.0, 0
    if checkpoint is not None:
        restore(checkpoint, lm, optimizer)
        stored = checkpoint.meta["history"]
        first, losses, seconds = checkpoint.step, list(stored["losses"]), stored["seconds"]
        history = {int(step): Evaluation.from_dict(found) for step, found in stored["evaluations"].items()}
    o = config.optimizer
    devices = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices), _Progress(config.name, o.steps, first, shown=progress) as bar:
        if checkpoint is None:
            torch.manual_seed(config.seed)
        else:
            restore_random_state(checkpoint)
        lm.weights.train()
        for step in range(first, o.steps):
            began = time.perf_counter()
            losses.append(training_step(lm, optimizer, data.batch(config.seed, step), config, step))
            seconds += time.perf_counter() - began
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(
                    f"the loss became {losses[-1]} at step {step} of {o.steps} (lr {o.lr:g}): try a smaller one."
                )
            n_done = step + 1
            if config.evaluation.every and n_done % config.evaluation.every == 0 and n_done < o.steps:
                history[n_done] = evaluate(lm, data, config)
            if n_done % config.checkpoint_every == 0 or n_done == o.steps:
                save_checkpoint(
                    out,
                    lm,
                    optimizer,
                    step=n_done,
                    config=config,
                    corpus=data.fingerprint,
                    history={
                        "losses": losses,
                        "seconds": seconds,
                        "evaluations": {str(s): found.to_dict() for s, found in history.items()},
                    },
                )
            bar(losses)
            if on_step is not None:
                on_step(n_done)
    result = TrainedModel(
        config=config,
        losses=tuple(losses),
        history=history,
        evaluation=evaluate(lm, data, config),
        eta=tuple(tuple(float(value) for value in row) for row in lm.eta.detach().cpu()),
        seconds=seconds,
        corpus=data.fingerprint,
    )
    result.save(out)
    return result


def finished_run(config: TrainingConfig, folder: Path) -> TrainedModel | None:
    """The result in a folder; None if there is none yet; `ModelMismatchError` if another configuration made it."""
    if not (folder / RESULT).is_file():
        return None
    done = TrainedModel.load(folder)
    differing = differing_fields(done.config.to_dict(), config.to_dict())
    if differing:
        raise ModelMismatchError(
            f"{folder} holds a run with another configuration; {'; '.join(differing)}. Choose another folder."
        )
    return done


def load_trained(folder: str | os.PathLike[str], *, device: str = "cpu") -> LanguageModel:
    """The model of a run, from its newest checkpoint, in eval mode; use it within its `with_momentum`.

    Raises:
        FileFormatError: there is no checkpoint, or it is damaged.
    """
    checkpoint = latest_checkpoint(Path(folder))
    if checkpoint is None:
        raise FileFormatError(f"{folder} holds no checkpoint of a training run.")
    config = TrainingConfig.from_dict(checkpoint.meta["config"])
    tokenizer = corpus_tokenizer(config.data)
    lm = build_model(config, n_vocab=checkpoint.meta["n_vocab"], tokenizer=tokenizer, device=device)
    restore(checkpoint, lm, None)
    lm.model.host.eval()
    lm.weights.eval()
    return lm


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Of a step counted from 0: linear warm-up, then decay to ``lr x last`` at the end."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    progress = min(1.0, max(0, step - settings.warmup) / max(settings.steps - settings.warmup, 1))
    if settings.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = (1 - progress) ** settings.power
    return settings.lr * warm * (settings.last + (1 - settings.last) * shape)


def training_step(
    lm: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainingConfig, step: int
) -> float:
    """One step of gradient descent; returns the loss before it."""
    o, device = config.optimizer, lm.model.device
    rate = learning_rate(o, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    tokens, weights = batch.tokens.to(device), batch.weights.to(device)
    half = o.precision == "bfloat16" or (o.precision == "auto" and device.type == "cuda")
    with lm.with_momentum():
        with torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext():
            logits = lm.logits(tokens)[:, :-1]
        loss = _loss(logits.float(), tokens[:, 1:], weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], o.clip)
    optimizer.step()
    return float(loss.detach())


def _loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * weights.flatten()).sum() / weights.sum()


def _optimizer(lm: LanguageModel, config: TrainingConfig) -> torch.optim.Optimizer:
    o = config.optimizer
    parameters = list(lm.weights.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay, "factor": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "factor": 1.0},
    ]
    if lm.logits_of_eta is not None:
        groups.append({"params": [lm.logits_of_eta], "weight_decay": 0.0, "factor": config.momentum.lr_factor})
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2))


class _Progress:
    """A bar on a terminal, with the loss of the last steps."""

    def __init__(self, name: str, total: int, first: int, *, shown: bool) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, initial=first, desc=name, unit="step", disable=None if shown else True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, losses: list[float]) -> None:
        self._bar.update()
        if len(losses) % 20 == 0:
            self._bar.set_postfix(loss=f"{sum(losses[-20:]) / 20:.3f}")
