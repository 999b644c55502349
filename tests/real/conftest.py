"""The pretrained model, loaded once: through the library, and in plain transformers from the same GGUF file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Plain

from metaopt_lens import ICLPrompt, load_model
from metaopt_lens.models import wrap
from metaopt_lens.prompts import TokenizedPrompt
from metaopt_lens.runs import tokenize_for

VARIABLE = "METAOPT_LENS_REAL"
# Gemma-3-270M sees 512 tokens in five of six layers: its prompts are longer.
_N_DEMOS = {"smollm2": 8, "gemma3-270m": 44}

_PRAISE = ("a joy from start to end", "warm and very funny", "a small wonder", "superb in every scene")
_BLAME = ("a waste of two hours", "dull and far too long", "a complete mess", "painful to sit through")
_SUBJECTS = ("The film is", "This story is", "Her second play is", "The whole series is", "The sequel is", "It is")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the variable these tests are skipped; with it, a missing package is an error."""
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason=f"needs a pretrained model: nox -s real, or {VARIABLE}=smollm2")
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)
            if VARIABLE not in os.environ:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def name() -> str:
    return os.environ[VARIABLE]


@pytest.fixture(scope="session", autouse=True)
def all_cores() -> Iterator[None]:
    """The suite runs its tiny models on one thread; these are large enough for more.

    On a machine that is busy with something else, threads wait for each other at every small product, and a token
    takes ten times as long: METAOPT_LENS_THREADS=1 then.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("METAOPT_LENS_THREADS", os.cpu_count() or 1)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bridge(name: str) -> Any:
    return load_model(name, device="cpu")


@pytest.fixture(scope="session")
def plain(name: str, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """De-quantised by transformers from the package's file, without our conversion."""
    from transformers import AutoModelForCausalLM

    from metaopt_lens.models._packaged import packaged_source

    folder = tmp_path_factory.mktemp("gguf")
    with (folder / "model.gguf").open("wb") as whole:
        for part in packaged_source(name).parts:
            whole.write(part.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    (folder / "model.gguf").unlink()
    return Plain(model.eval())


def reviews(n_demos: int, query: str = "The ending is a small wonder") -> ICLPrompt:
    """Demonstrations of a task that the models know, no two alike."""
    demos = []
    for i in range(n_demos):
        verdicts, label = (_PRAISE, "positive") if i % 2 == 0 else (_BLAME, "negative")
        subject = _SUBJECTS[i % len(_SUBJECTS)]
        demos.append((f"{subject} {verdicts[i // 2 % len(verdicts)]}, take {i + 1}", label))
    return ICLPrompt(demos, query, label="positive", candidates=("positive", "negative"))


@pytest.fixture(scope="session")
def prompt(name: str) -> ICLPrompt:
    return reviews(_N_DEMOS[name])


@pytest.fixture(scope="session")
def tokens(bridge: Any, prompt: ICLPrompt) -> TokenizedPrompt:
    return tokenize_for(wrap(bridge), prompt, require_demos=True)
