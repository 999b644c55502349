"""compare_momentum(): train plain and momentum attention from the same seeds on the same data, in pairs."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from metaopt_lens._errors import OptionError
from metaopt_lens.training._corpora import Corpus, load_corpus
from metaopt_lens.training._momentum_comparison import ARMS, MomentumComparison, run_folder
from metaopt_lens.training._trained_model import TrainedModel, finished_run
from metaopt_lens.training._training_config import TrainingConfig
from metaopt_lens.training._training_run import train


def compare_momentum(
    config: TrainingConfig,
    folder: str | os.PathLike[str],
    *,
    seeds: int | Sequence[int] = 5,
    jobs: int = 1,
    device: str | None = None,
    progress: bool = True,
) -> MomentumComparison:
    """Train both arms from every seed (same weights to start from, data order and budget) and compare them in pairs.

    Runs that `folder` already holds are read; interrupted ones are resumed.

    Args:
        config: configuration of the momentum arm.
        folder: where the runs are kept.
        seeds: how many, or which.
        jobs: processes that train at the same time.
        device: where to train; by default CUDA if there is one.
        progress: show a bar for every run.

    Raises:
        OptionError: fewer than two seeds, or a configuration without momentum.
        ModelMismatchError: the folder holds runs with another configuration.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(chosen)) < 2 or len(set(chosen)) < len(chosen):
        raise OptionError(f"a paired comparison needs at least two different seeds, got {list(chosen)}.")
    if jobs < 1:
        raise OptionError(f"jobs must be at least 1, got {jobs}.")
    if not config.has_momentum:
        raise OptionError("the configuration has no momentum to compare with plain attention: set momentum.eta.")
    out = Path(folder)
    arms = {"plain": config.replace(momentum={"eta": 0.0, "learned": False, "lags": 0}), "momentum": config}
    tasks = [
        (arms[arm].replace(seed=seed, name=f"{config.name} {arm} seed {seed}"), run_folder(out, arm, seed))
        for seed in chosen
        for arm in ARMS
    ]
    for task, where in tasks:  # refuses other configurations before anything runs
        finished_run(task, where)
    if jobs == 1:
        corpus = load_corpus(config)
        for task, where in tasks:
            train(task, where, corpus=corpus, device=device, progress=progress)
    else:
        load_corpus(config)
        _in_processes(tasks, jobs, device, progress)
    plain, momentum = (tuple(TrainedModel.load(run_folder(out, arm, seed)) for seed in chosen) for arm in ARMS)
    comparison = MomentumComparison(config, chosen, plain, momentum)
    comparison.save(out)
    return comparison


def _in_processes(tasks: Sequence[tuple[TrainingConfig, Path]], jobs: int, device: str | None, progress: bool) -> None:
    from tqdm.auto import tqdm

    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool,
        tqdm(total=len(tasks), desc="runs", unit="run", disable=None if progress else True) as bar,
    ):
        futures = [pool.submit(_train_in_worker, task, where, device) for task, where in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


_CORPORA: dict[str, Corpus] = {}


def _train_in_worker(config: TrainingConfig, folder: Path, device: str | None) -> None:
    # Seeds and arms share their text; reading it takes seconds.
    key = json.dumps([config.to_dict()[name] for name in ("data", "model", "optimizer")])
    if key not in _CORPORA:
        _CORPORA.clear()
        _CORPORA[key] = load_corpus(config)
    parent = multiprocessing.parent_process()

    def stop_if_orphaned(step: int) -> None:  # noqa: ARG001
        if parent is not None and not parent.is_alive():
            raise SystemExit("the process that started this run has ended; its checkpoint is kept")

    train(config, folder, corpus=_CORPORA[key], device=device, progress=False, on_step=stop_if_orphaned)
