"""Training small language models with momentum attention: resumable to the bit, and compared in pairs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hosts import HOOKED_NAMES, host_values, host_z, left_as_it_was, requires_hooked, shared
from rounding import PASS, SUM, assert_agree, rounding
from safetensors.torch import load_file

from metaopt_lens import MetaoptLensError, decompose, intervene, wrap
from metaopt_lens.interventions import MomentumAttention
from metaopt_lens.models.tiny import accuracy, sample_episodes
from metaopt_lens.training import (
    SHIPPED,
    MomentumComparison,
    ShortConvolution,
    TrainedModel,
    TrainingConfig,
    build_model,
    compare_momentum,
    load_corpus,
    load_trained,
    train,
)
from metaopt_lens.training._corpora import word_tokenizer
from metaopt_lens.training._momentum_comparison import t_interval
from metaopt_lens.training._optimization import learning_rate


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(**changes: Any) -> TrainingConfig:
    config = TrainingConfig().replace(
        checkpoint_every=4,
        model={"n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 24, "n_ctx": 48},
        data={"n_items": (6, 8), "n_categories": (2, 2)},
        optimizer={"steps": 10, "batch": 4, "warmup": 2},
        evaluation={"context_lengths": (9, 17), "n_tokens": 200, "demos": (0, 4), "n_episodes": 8},
    )
    return config.replace(**changes)


def text(tmp_path: Path, **changes: Any) -> TrainingConfig:
    file = tmp_path / "corpus.txt"
    if not file.exists():
        words = [f"word{i * i % 97} is {'even' if i % 2 else 'odd'}." for i in range(3000)]
        file.write_text("\n\n".join(" ".join(words[i : i + 20]) for i in range(0, 3000, 20)), encoding="utf-8")
    config = small(
        data={"source": "text", "path": str(file), "validation": 0.3}, evaluation={"demos": (), "n_tokens": 400}
    )
    return config.replace(**changes)


def newest(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max(folder.glob("step-*.safetensors")))


# ---- resuming ---------------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    import torch
    from metaopt_lens.training import TrainingConfig, train

    torch.set_num_threads(1)
    config = TrainingConfig.from_dict(__import__("json").loads(sys.argv[1]))

    def stop(step):
        if step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, sys.argv[2], progress=False, device="cpu", on_step=stop)
"""


def run_until_killed(config: TrainingConfig, folder: Path, step: int) -> None:
    arguments = [json.dumps(config.to_dict()), str(folder), str(step)]
    code = textwrap.dedent(KILLED)
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.fixture(scope="module")
def _killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_until_killed(small(), folder, 5)
    return folder


@pytest.fixture
def killed(_killed_once: Path, tmp_path: Path) -> Path:
    """A run of `small` that was killed after step 5, its checkpoint made at step 4."""
    return Path(shutil.copytree(_killed_once, tmp_path / "killed"))


@pytest.mark.parametrize("learned", [False, True])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(learned: bool, tmp_path: Path) -> None:
    config = small(momentum={"eta": 0.4, "learned": learned}, evaluation={"every": 5})
    whole = train(config, tmp_path / "whole", progress=False, device="cpu")
    run_until_killed(config, tmp_path / "killed", 6)  # the last checkpoint is that of step 4
    assert not (tmp_path / "killed" / "result.json").exists()
    assert [f.name for f in sorted((tmp_path / "killed").glob("step-*.json"))] == ["step-00000004.json"]
    resumed = train(config, tmp_path / "killed", progress=False, device="cpu")
    assert resumed.losses == whole.losses
    assert resumed.evaluation == whole.evaluation
    assert resumed.history == whole.history
    assert resumed.eta == whole.eta
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.startswith("optimizer/") for name in one)


def test_killed_at_a_random_moment_leaves_something_to_resume_from(tmp_path: Path) -> None:
    """The signal comes from outside, perhaps in the middle of writing a checkpoint."""
    config = small(checkpoint_every=1, optimizer={"steps": 2000})
    arguments = [json.dumps(config.to_dict()), str(tmp_path / "run"), "-1"]
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "run").glob("step-*.json"))) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    child.send_signal(signal.SIGKILL)
    child.wait()
    lm = load_trained(tmp_path / "run")
    assert all(torch.isfinite(p).all() for p in lm.weights.parameters())


def test_a_finished_run_is_read_and_not_made_again(tmp_path: Path) -> None:
    first = train(small(), tmp_path, progress=False)
    stamp = os.stat(tmp_path / "result.json").st_mtime_ns
    assert train(small(), tmp_path, progress=False) == first == TrainedModel.load(tmp_path)
    assert os.stat(tmp_path / "result.json").st_mtime_ns == stamp


def test_resuming_with_another_configuration_names_the_fields(killed: Path) -> None:
    other = small(seed=3, optimizer={"lr": 1e-4}, momentum={"eta": 0.9})
    message = (
        r"another configuration; seed: 0 there, 3 here; momentum.eta: 0.5 there, 0.9 here; "
        r"optimizer.lr: 0.003 there, 0.0001 here\. Resume with the one it was made with"
    )
    with pytest.raises(MetaoptLensError, match=message):
        train(other, killed, progress=False)
    train(small(), killed, progress=False)
    with pytest.raises(MetaoptLensError, match=r"holds a run with another configuration; seed: 0 there, 3 here"):
        train(small(seed=3), killed, progress=False)


def test_resuming_on_other_text_is_refused(tmp_path: Path) -> None:
    config = text(tmp_path)

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train(config, tmp_path / "run", progress=False, on_step=stop)
    with (tmp_path / "corpus.txt").open("a", encoding="utf-8") as file:
        file.write("\n\nmore")
    with pytest.raises(MetaoptLensError, match="made on other text"):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize("damage", ["cut short", "flipped", "json"])
def test_a_damaged_checkpoint_is_refused(damage: str, killed: Path) -> None:
    file = killed / ("step-00000004.json" if damage == "json" else "step-00000004.safetensors")
    raw = bytearray(file.read_bytes())
    if damage == "flipped":
        raw[-5] ^= 1
    else:
        del raw[len(raw) // 2 :]
    file.write_bytes(raw)
    with pytest.raises(MetaoptLensError, match=r"the checkpoint cannot be used: .*step-00000004.*Remove step-00000004"):
        train(small(), killed, progress=False)


# ---- what is trained --------------------------------------------------------------------------------------------


def test_both_arms_start_from_the_same_weights_and_see_the_same_batches() -> None:
    plain, momentum = small(momentum={"eta": 0.0}), small(momentum={"eta": 0.5, "learned": True})
    corpus = load_corpus(plain)
    one, other = (build_model(c, n_vocab=corpus.n_vocab) for c in (plain, momentum))
    for (name, p), (_, q) in zip(one.weights.named_parameters(), other.weights.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    for step in (0, 7):
        a, b = corpus.batch(0, step), load_corpus(momentum).batch(0, step)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.weights, b.weights)
    assert not torch.equal(corpus.batch(0, 1).tokens[:, :20], corpus.batch(1, 1).tokens[:, :20])


def test_eta_zero_trains_the_plain_model(tmp_path: Path) -> None:
    """By a loop of its own, without any of our hooks."""
    config = small(momentum={"eta": 0.0}, optimizer={"steps": 4})
    ours = train(config, tmp_path, progress=False, device="cpu")
    corpus = load_corpus(config)
    model = build_model(config, n_vocab=corpus.n_vocab).weights
    o = config.optimizer
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": o.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2))
    losses = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step)
        batch = corpus.batch(0, step)
        log_probs = model(input_ids=batch.tokens).logits[:, :-1].log_softmax(-1)
        nll = -log_probs.gather(-1, batch.tokens[:, 1:, None])[..., 0]
        loss = (nll * batch.weights).sum() / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-4)


def test_momentum_is_on_in_training_and_eta_is_learned(tmp_path: Path) -> None:
    fixed = train(small(), tmp_path / "fixed", progress=False)
    plain = train(small(momentum={"eta": 0.0}), tmp_path / "plain", progress=False)
    learned = train(small(momentum={"eta": 0.5, "learned": True}), tmp_path / "learned", progress=False)
    assert plain.losses[0] != fixed.losses[0]
    assert fixed.losses[0] == pytest.approx(learned.losses[0], rel=rounding(PASS, 1.0))
    assert fixed.eta == ((0.5, 0.5), (0.5, 0.5))
    etas = np.array(learned.eta)
    assert (etas != 0.5).all()
    assert ((etas > 0) & (etas < 1)).all()


def test_a_learned_eta_cannot_reach_one() -> None:
    lm = build_model(small(momentum={"learned": True}), n_vocab=60)
    assert lm.logits_of_eta is not None
    with torch.no_grad():
        lm.logits_of_eta.fill_(1e4)
    assert lm.momentum() is not None
    assert bool((lm.eta < 1).all())


def test_a_trained_model_loads_and_computes_what_was_evaluated(tmp_path: Path) -> None:
    config = small(momentum={"eta": 0.3, "learned": True})
    run = train(config, tmp_path, progress=False, device="cpu")
    lm = load_trained(tmp_path)
    windows = load_corpus(config).windows(9, 200)
    tokens = windows.tokens
    assert 0 < float(windows.weights.mean()) < 1  # a first label cannot be known
    with torch.no_grad(), intervene(lm.model, MomentumAttention(torch.tensor(run.eta))):
        logits = lm.model.host(tokens)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")[windows.weights > 0]
    assert run.evaluation.perplexity[9] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
    for table, held_out in ((run.evaluation.accuracy, True), (run.evaluation.accuracy_seen, False)):
        episodes = sample_episodes(n=8, n_demos=4, n_categories=2, held_out=held_out, seed=1)
        with intervene(lm.model, MomentumAttention(torch.tensor(run.eta))):
            assert table[4] == accuracy(lm.model.host, episodes)["candidates"]


@pytest.mark.parametrize("name", ["bridge:gpt2", "bridge:llama", "native:rotary", *HOOKED_NAMES[:1]])
def test_the_control_adds_the_last_values_only(name: str) -> None:
    """Layer by layer, from the host's own values; padded and behind the host's cache as alone."""
    model, ids = shared(name), [1, 30, 31, 3, 32, 40, 41, 3, 50]
    eta = torch.linspace(0.2, 0.9, 12).reshape(3, 4)
    term = ShortConvolution(eta, lags=2)
    plain, values = host_z(model, ids)[:, 0], host_values(model, ids, "attn.hook_v")[0]
    v = values.reshape(len(ids), -1, plain.shape[-1])
    with left_as_it_was(model), intervene(model, term):
        found = host_z(model, ids)[:, 0]
        logits = model(torch.tensor([ids]))[0, -1]
    for t in range(len(ids)):
        for head in range(4):
            expected = plain[t, head].clone()
            for i in range(max(0, t - 2), t):
                expected += eta[0, head] ** (t - i) * v[i, head // (4 // v.shape[1])]
            assert_agree(found[t, head], expected, SUM, of=(found,))
    mask = torch.tensor([[0, 0, *[1] * len(ids)]])
    with intervene(model, term):
        padded = model(torch.tensor([[0, 0, *ids]]), attention_mask=mask)[0, -1]
        prefix = wrap(model).run_prefix(torch.tensor(ids[:5]))
        behind = wrap(model).run(torch.tensor([ids[5:]]), prefix=prefix)
    assert_agree(padded, logits, PASS)
    assert_agree(behind[0, -1], logits, PASS)  # type: ignore[index]
    with intervene(model, ShortConvolution(eta, lags=100)):
        all_lags = model(torch.tensor([ids]))
    with intervene(model, MomentumAttention(eta)):
        assert_agree(all_lags, model(torch.tensor([ids])), PASS)


def test_the_control_trains(tmp_path: Path) -> None:
    config = small(momentum={"lags": 2})
    run = train(config, tmp_path / "short", progress=False, device="cpu")
    assert isinstance(load_trained(tmp_path / "short").momentum(), ShortConvolution)
    whole = train(small(), tmp_path / "whole", progress=False, device="cpu")
    assert run.losses[0] != whole.losses[0]
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("host", ["bridge", "native", pytest.param("hooked", marks=requires_hooked)])
def test_every_host_trains_and_resumes_to_the_bit(host: str, positions: str, tmp_path: Path) -> None:
    config = small(model={"host": host, "positions": positions}, momentum={"eta": 0.3, "learned": True})
    whole = train(config, tmp_path / "whole", progress=False, device="cpu")
    assert whole.losses[-1] < whole.losses[0]

    def stop(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "pieces", progress=False, device="cpu", on_step=stop)
    pieces = train(config, tmp_path / "pieces", progress=False, device="cpu")
    assert pieces.losses == whole.losses
    assert pieces.evaluation == whole.evaluation
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "pieces")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    loaded = load_trained(tmp_path / "pieces")
    assert loaded.model.info.positions == positions
    demonstrated = decompose(loaded.model, "apple : dax\nhammer : wug\npear :", momentum=loaded.momentum())
    torch.testing.assert_close(demonstrated.eta, loaded.eta.detach().cpu(), check_dtype=False)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    run = train(small(optimizer={"precision": "bfloat16"}), tmp_path, progress=False, device="cpu")
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_learning_rate_warms_up_and_decays(schedule: str) -> None:
    o = small(optimizer={"steps": 100, "warmup": 10, "lr": 1.0, "schedule": schedule, "last": 0.1}).optimizer
    rates = [learning_rate(o, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55)


# ---- corpora ----------------------------------------------------------------------------------------------------


def test_text_is_bytes_with_whole_documents_held_out(tmp_path: Path) -> None:
    config = text(tmp_path)
    corpus = load_corpus(config)
    batch = corpus.batch(0, 0)
    assert batch.tokens.shape == (4, 48)
    assert int(batch.tokens.max()) <= 256
    content = (tmp_path / "corpus.txt").read_bytes()
    row = bytes(t for t in batch.tokens[0].tolist() if t < 256)
    assert row in content or 256 in batch.tokens[0]
    windows = corpus.windows(17, 400)
    assert windows.tokens.shape[1] == 17
    assert bool((windows.weights == 1).all())
    assert torch.equal(windows.tokens, corpus.windows(17, 400).tokens)
    halves, wholes = corpus.windows(8, 400).tokens, corpus.windows(16, 400).tokens
    assert torch.equal(halves.reshape(-1, 16), wholes)  # every length is measured on the same text
    run = train(config, tmp_path / "run", progress=False)
    assert set(run.evaluation.perplexity) == {9, 17}
    assert run.evaluation.accuracy == {}


def test_a_dataset_read_by_its_name_with_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "things"
    folder.mkdir()
    lines = [{"story": f"apple : dax\nhammer : wug\npear : {'dax' if i % 2 else 'wug'}\n"} for i in range(80)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    word_tokenizer().save_pretrained(tmp_path / "words")
    data = {"source": "datasets", "name": str(folder), "column": "story", "tokenizer": str(tmp_path / "words")}
    config = small(data={**data, "validation": 0.3}, evaluation={"demos": (), "n_tokens": 100}, optimizer={"steps": 3})
    corpus = load_corpus(config)
    assert corpus.n_vocab == len(word_tokenizer())
    words = corpus.tokenizer.decode(corpus.batch(0, 0).tokens[0]).split()  # type: ignore[union-attr]
    assert {"apple", "dax", "wug", "pear"} <= set(words)
    run = train(config, tmp_path / "run", progress=False, device="cpu")
    assert run.evaluation.perplexity[17] < len(word_tokenizer())
    assert load_trained(tmp_path / "run").model.tokenizer is not None
    with pytest.raises(MetaoptLensError, match=r"things' cannot be read \(.*text"):
        load_corpus(config.replace(data={"column": "text"}))
    with pytest.raises(MetaoptLensError, match=r"the tokenizer .*nothing' cannot be loaded"):
        load_corpus(config.replace(data={"tokenizer": str(tmp_path / "nothing")}))


def test_a_corpus_shorter_than_one_context(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    config = text(tmp_path).replace(data={"path": str(tmp_path / "short.txt")})
    with pytest.raises(MetaoptLensError, match=r"part of the corpus has \d+ tokens, but one context needs 49"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_missing_text(tmp_path: Path) -> None:
    config = text(tmp_path).replace(data={"path": str(tmp_path / "nothing.txt")})
    with pytest.raises(MetaoptLensError, match=r"nothing.txt cannot be read"):
        load_corpus(config)


def test_the_docstrings_of_python() -> None:
    config = small(data={"source": "python"}, evaluation={"demos": ()})
    corpus = load_corpus(config)
    assert len(corpus) > 300_000  # type: ignore[arg-type]
    assert len(corpus.fingerprint) == 64


def test_few_shot_accuracy_from_a_prompt_file(tmp_path: Path) -> None:
    from metaopt_lens.models.tiny import sample_episodes
    from metaopt_lens.models.tiny._load import DATA

    episodes = sample_episodes(n=6, n_demos=3, n_categories=2, seed=0)
    lines = [
        json.dumps(
            {"demos": [list(d) for d in e.demos], "query": e.query, "label": e.answer, "candidates": e.candidates}
        )
        for e in episodes
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    nouns = " \n ".join(f"{noun} : {label}" for e in episodes for noun, label in e.demos)
    (tmp_path / "words.txt").write_text("\n\n".join([nouns] * 40), encoding="utf-8")
    config = text(tmp_path).replace(
        data={"path": str(tmp_path / "words.txt"), "tokenizer": str(DATA)},
        evaluation={"prompts": str(tmp_path / "prompts.jsonl"), "demos": (0, 3)},
    )
    run = train(config, tmp_path / "run", progress=False)
    assert set(run.evaluation.accuracy) == {0, 3}
    assert all(0 <= value <= 1 for value in run.evaluation.accuracy.values())


# ---- configurations ---------------------------------------------------------------------------------------------


OF_0_1 = """
{"name": "icl-small", "seed": 0, "checkpoint_every": 1000,
"note": "The synthetic in-context tasks on a small model: minutes on a CPU.", "model": {"n_layers": 2,
"d_model": 64, "n_heads": 4, "d_mlp": 128, "n_ctx": 128, "positions": "rotary", "host": "bridge"},
"momentum": {"eta": 0.5, "learned": false, "lr_factor": 3.0, "lags": 0}, "data": {"source": "synthetic",
"path": null, "name": null, "subset": null, "split": "train", "column": "text", "tokenizer": null,
"validation": 0.1, "n_items": [12, 16], "n_categories": [2, 3], "curriculum": [0.1, 0.6]},
"optimizer": {"steps": 4000, "batch": 32, "lr": 0.003, "warmup": 50, "schedule": "cosine", "power": 1.0,
"last": 0.0, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.01, "clip": 1.0, "precision": "auto"},
"evaluation": {"context_lengths": [17, 33, 65], "n_tokens": 16384, "demos": [0, 1, 2, 4, 8, 16],
"n_episodes": 400, "categories": 2, "prompts": null, "every": 400}}
"""
"""What version 0.1 stored of icl-small."""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_read(name: str) -> None:
    config = TrainingConfig.load(name)
    assert config.name == name
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_the_published_configuration() -> None:
    config = TrainingConfig.load("paper-350m")
    assert (config.model.n_layers, config.model.d_model, config.model.n_heads) == (24, 1024, 16)
    assert (config.optimizer.steps, config.optimizer.beta1, config.optimizer.beta2) == (500_000, 0.9, 0.98)
    assert config.evaluation.context_lengths == (256, 512, 1024)
    assert config.note.startswith("not run here")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"momentum": {"eta": 1.0}}, r"momentum.eta must be a finite number of at least 0 and less than 1, got 1.0"),
        ({"momentum": {"eta": float("nan")}}, r"momentum.eta must be .*, got nan"),
        ({"momentum": {"eta": 0.0, "learned": True}}, r"\[momentum\]: a learned eta must start above 0, got 0.0"),
        ({"momentum": {"eta": "half"}}, r"momentum.eta must be a finite number .*, got 'half'"),
        ({"momentum": {"learned": 1}}, r"momentum.learned must be true or false, got 1"),
        ({"momentum": 3}, r"momentum must be a table, got 3"),
        ({"optimiser": {}}, r"has no field 'optimiser'; its fields are name, seed, .* Did you mean 'optimizer'"),
        (
            {"optimizer": {"learning_rate": 1}},
            r"the configuration, \[optimizer\] has no field 'learning_rate'; its fields are steps",
        ),
        ({"optimizer": {"warm_up": 1}}, r"its fields are steps, .* Did you mean 'warmup'"),
        ({"optimizer": {"steps": 1.5}}, r"optimizer.steps must be a whole number of at least 1, got 1.5"),
        ({"optimizer": {"lr": -1.0}}, r"optimizer.lr must be a finite number greater than 0, got -1.0"),
        ({"optimizer": {"lr": float("inf")}}, r"optimizer.lr must be a finite number greater than 0, got inf"),
        ({"optimizer": {"warmup": -1}}, r"optimizer.warmup must be a whole number of at least 0, got -1"),
        ({"model": {"d_model": 30}}, r"\[model\]: d_model must be a multiple of n_heads \(4\), got 30"),
        ({"model": {"d_model": 36}}, r"\[model\]: d_model / n_heads must be even for rotary positions, got 36"),
        ({"model": {"host": "mamba"}}, r"model.host must be one of bridge, native, hooked, got 'mamba'"),
        ({"model": {"n_ctx": 64}}, r"n_ctx must hold the longest synthetic sequence \(97\), got 64"),
        ({"evaluation": {"context_lengths": [256]}}, r"context_lengths must be from 2 to n_ctx \(128\), got 256"),
        (
            {"evaluation": {"context_lengths": [1]}},
            r"context_lengths must be .* whole numbers of at least 2, got \[1\]",
        ),
        ({"evaluation": {"context_lengths": []}}, r"context_lengths must be one or several .*, got \[\]"),
        ({"evaluation": {"demos": [-1]}}, r"demos must be a list of values, each a whole number .*, got \[-1\]"),
        ({"data": {"source": "text"}}, r"data.source 'text' needs data.path, got None"),
        ({"data": {"source": "datasets"}}, r"data.source 'datasets' needs data.name, got None"),
        ({"data": {"n_items": [3, 2]}}, r"data.n_items must be a smallest and a largest whole number, got \[3, 2\]"),
        ({"data": {"curriculum": [0.1]}}, r"data.curriculum must be a smallest and a largest number, got \[0.1\]"),
        ({"data": {"validation": 1}}, r"data.validation must be .* greater than 0 and less than 1, got 1"),
    ],
)
def test_configurations_that_make_no_sense(body: dict[str, Any], message: str) -> None:
    with pytest.raises(MetaoptLensError, match=message):
        TrainingConfig.from_dict(body)


def test_changes_are_checked_as_files_are() -> None:
    with pytest.raises(MetaoptLensError, match=r"^optimizer.steps must be a whole number of at least 1, got 0.$"):
        TrainingConfig().replace(optimizer={"steps": 0})
    with pytest.raises(MetaoptLensError, match=r"^TrainingConfig, \[momentum\] has no field 'lag'; .*mean 'lags'"):
        TrainingConfig().replace(momentum={"lag": 2})
    with pytest.raises(MetaoptLensError, match=r"^TrainingConfig has no field 'optimiser'"):
        TrainingConfig().replace(optimiser={})
    changed = TrainingConfig().replace(seed=2, momentum={"eta": 0.25})
    assert (changed.seed, changed.momentum.eta, changed.momentum.lr_factor) == (2, 0.25, 3.0)


def test_a_configuration_of_0_1_is_read() -> None:
    stored = json.loads(OF_0_1)
    assert TrainingConfig.from_dict(stored) == TrainingConfig.load("icl-small")
    assert TrainingConfig.load("icl-small").to_dict() == stored


def test_configuration_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MetaoptLensError, match=r"there is no configuration .*one of icl-small, text-small, paper-350m"):
        TrainingConfig.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3", encoding="utf-8")
    with pytest.raises(MetaoptLensError, match="is not valid TOML"):
        TrainingConfig.load(tmp_path / "bad.toml")


# ---- comparing --------------------------------------------------------------------------------------------------


def test_t_interval() -> None:
    low, high = t_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.7764451051977987 * np.std([1, 2, 3, 4, 5], ddof=1) / np.sqrt(5)
    assert (low, high) == (pytest.approx(3 - half), pytest.approx(3 + half))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_pairs_the_arms_by_seed(jobs: int, tmp_path: Path) -> None:
    config = small(optimizer={"steps": 3}, evaluation={"every": 2})
    found = compare_momentum(config, tmp_path, seeds=3, jobs=jobs, progress=False, device="cpu")
    assert [run.config.seed for run in found.plain] == [0, 1, 2]
    assert all(run.config.momentum.eta == 0 for run in found.plain)
    alone = train(found.momentum[1].config, tmp_path / "alone", progress=False, device="cpu")
    assert alone.evaluation == found.momentum[1].evaluation
    summary = found.summary().set_index(["metric", "at"])
    row = summary.loc[("perplexity", 17)]
    difference = [
        m.evaluation.perplexity[17] - p.evaluation.perplexity[17]
        for m, p in zip(found.momentum, found.plain, strict=True)
    ]
    assert row["difference"] == pytest.approx(np.mean(difference))
    assert (row["low"], row["high"]) == pytest.approx(t_interval(np.array(difference)))
    expected = "" if row["low"] <= 0 <= row["high"] else "momentum" if row["high"] < 0 else "plain"
    assert row["better"] == expected
    history = found.history()
    assert set(history["step"]) == {2, 3}
    at_the_end = history[history["step"] == 3].drop(columns="step").reset_index(drop=True)
    runs = found.runs()
    assert at_the_end["value"].tolist() == runs[runs["metric"] != "last training loss"]["value"].tolist()
    assert {"comparison.json", "summary.csv", "runs.csv", "history.csv"} <= {f.name for f in tmp_path.iterdir()}
    assert MomentumComparison.load(tmp_path).summary().equals(found.summary())


def test_comparisons_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(MetaoptLensError, match="no momentum to compare"):
        compare_momentum(small(momentum={"eta": 0.0}), tmp_path)
    with pytest.raises(MetaoptLensError, match="at least two different seeds"):
        compare_momentum(small(), tmp_path, seeds=1)
    with pytest.raises(MetaoptLensError, match="holds no finished comparison"):
        MomentumComparison.load(tmp_path)


# ---- the command line and its page ------------------------------------------------------------------------------


def test_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from metaopt_lens.cli import app

    (tmp_path / "small.toml").write_text(
        """
        name = "small"
        [model]
        d_model = 16
        n_heads = 2
        d_mlp = 24
        n_ctx = 48
        [data]
        n_items = [6, 8]
        n_categories = [2, 2]
        [optimizer]
        batch = 4
        [evaluation]
        context_lengths = [9, 17]
        n_tokens = 200
        demos = [0, 4]
        n_episodes = 8
        every = 1
        """,
        encoding="utf-8",
    )
    file, out = str(tmp_path / "small.toml"), tmp_path / "out"
    done = CliRunner().invoke(
        app, ["momentum", "train", file, "--steps", "2", "--eta", "0.2", "--out", str(out / "one")]
    )
    assert done.exit_code == 0, done.output
    assert "perplexity at 17 tokens" in done.output
    assert TrainedModel.load(out / "one").config.momentum.eta == 0.2
    arguments = ["momentum", "compare", file, "--steps", "2", "--seeds", "2", "--learned", "--out", str(out / "two")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    control = CliRunner().invoke(app, [*arguments[:-1], str(out / "control"), "--lags", "2"])
    assert "momentum (only the last 2 tokens: a control) minus plain" in control.output
    assert "last 2 values minus plain" in (out / "control" / "momentum.html").read_text(encoding="utf-8")
    assert MomentumComparison.load(out / "control" / "small").plain[0].config.momentum.lags == 0
    assert "accuracy on seen bindings" in done.output
    page = (out / "two" / "momentum.html").read_text(encoding="utf-8")
    assert "momentum minus plain" in page
    assert "accuracy on seen bindings, during training" in page
    assert "L1H1" in page  # the table of learned etas
    assert "<script src=" not in page
    refused = CliRunner().invoke(app, ["momentum", "train", file, "--eta", "1.5", "--out", str(out / "three")])
    assert refused.exit_code == 2
    assert not (out / "three").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from metaopt_lens.cli import app; "
        "done = CliRunner().invoke(app, ['momentum', 'train', '--help']); assert done.exit_code == 0; "
        "assert not {'torch', 'plotly', 'transformer_lens', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
