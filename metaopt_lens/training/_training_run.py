"""train(): a small language model from scratch, resumable at any moment."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter

from metaopt_lens._errors import FileFormatError, NonFiniteError
from metaopt_lens.training._checkpoint import (
    Checkpoint,
    check_same_run,
    latest_checkpoint,
    restore,
    restore_random_state,
    save_checkpoint,
)
from metaopt_lens.training._corpora import Corpus, corpus_tokenizer, load_corpus
from metaopt_lens.training._evaluation import Evaluation, evaluate
from metaopt_lens.training._language_model import LanguageModel, build_model
from metaopt_lens.training._optimization import make_optimizer, training_step
from metaopt_lens.training._trained_model import TrainedModel, finished_run
from metaopt_lens.training._training_config import TrainingConfig


def train(
    config: TrainingConfig,
    folder: str | os.PathLike[str],
    *,
    corpus: Corpus | None = None,
    device: str | None = None,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainedModel:
    """Train a model from scratch, or resume an interrupted run in `folder`.

    On the CPU a run that was interrupted and resumed equals the uninterrupted one bit for bit (with the same number of
    threads). A finished run is read, not repeated.

    Args:
        config: everything that decides the run.
        folder: holds checkpoints and result.
        corpus: loaded already; by default that of the configuration.
        device: where to train; by default CUDA if there is one.
        progress: show a bar.
        on_step: called after every step with its number.

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
    optimizer = make_optimizer(lm, config)
    so_far = _SoFar()
    if checkpoint is not None:
        restore(checkpoint, lm, optimizer)
        so_far = TypeAdapter(_SoFar).validate_python(checkpoint.meta["history"])
    n_steps, every = config.optimizer.steps, config.evaluation.every
    with _random_state(config.seed, checkpoint, where), _Progress(config.name, n_steps, so_far, shown=progress) as bar:
        lm.weights.train()
        for step in range(len(so_far.losses), n_steps):
            _learn(lm, optimizer, data, config, step, so_far)
            n_done = step + 1
            if every and n_done % every == 0 and n_done < n_steps:
                so_far.evaluations[n_done] = evaluate(lm, data, config)
            if n_done % config.checkpoint_every == 0 or n_done == n_steps:
                history = TypeAdapter(_SoFar).dump_python(so_far, mode="json")
                save_checkpoint(
                    out, lm, optimizer, step=n_done, config=config, corpus=data.fingerprint, history=history
                )
            bar(so_far.losses)
            if on_step is not None:
                on_step(n_done)
    result = TrainedModel(
        config=config,
        losses=tuple(so_far.losses),
        history=so_far.evaluations,
        evaluation=evaluate(lm, data, config),
        eta=tuple(tuple(float(value) for value in row) for row in lm.eta.detach().cpu()),
        seconds=so_far.seconds,
        corpus=data.fingerprint,
    )
    result.save(out)
    return result


@dataclass
class _SoFar:
    """What a run has measured until now; stored with every checkpoint."""

    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def _random_state(seed: int, checkpoint: Checkpoint | None, where: torch.device) -> Iterator[None]:
    """Torch's random state within the block: of the seed, or of the checkpoint; restored afterwards."""
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        if checkpoint is None:
            torch.manual_seed(seed)
        else:
            restore_random_state(checkpoint)
        yield


def _learn(
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    data: Corpus,
    config: TrainingConfig,
    step: int,
    so_far: _SoFar,
) -> None:
    """One training step, noted."""
    began = time.perf_counter()
    loss = training_step(lm, optimizer, data.batch(config.seed, step), config, step)
    so_far.losses.append(loss)
    so_far.seconds += time.perf_counter() - began
    if not math.isfinite(loss):
        o = config.optimizer
        raise NonFiniteError(f"the loss became {loss} at step {step} of {o.steps} (lr {o.lr:g}): try a smaller one.")


def load_trained(folder: str | os.PathLike[str], *, device: str = "cpu") -> LanguageModel:
    """The model of a run, from its newest checkpoint, in eval mode; use it within its `with_momentum`.

    Args:
        folder: the run's folder.
        device: where the weights are put.

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


class _Progress:
    """A bar on a terminal, with the loss of the last steps."""

    def __init__(self, name: str, total: int, so_far: _SoFar, *, shown: bool) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=total, initial=len(so_far.losses), desc=name, unit="step", disable=None if shown else True
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, losses: list[float]) -> None:
        self._bar.update()
        if len(losses) % 20 == 0:
            self._bar.set_postfix(loss=f"{sum(losses[-20:]) / 20:.3f}")
