"""How far a call travels: the package's files that one warm `decompose` and one warm `compare` touch.

`python benchmarks/count_files.py` runs both on the bundled model under `sys.setprofile` and prints, for each, how many
files of the package have a function called, and how often a call lands in another file than the call before it. With
``--files`` it lists them with their numbers of calls. It counts and measures no time; code of other packages does not
count, and neither do comprehensions and generated methods of dataclasses.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import metaopt_lens as ml
from metaopt_lens.models.tiny import sample_episode

PACKAGE = str(Path(ml.__file__).parent)


def files_touched(call: Callable[[], Any]) -> tuple[Counter[str], int]:
    """Calls per file of the package, and how often the file changes from one call to the next."""
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            calls.append(str(Path(code.co_filename).relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Counter(calls), sum(one != other for one, other in pairwise(calls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", action="store_true", help="list the files with their calls")
    show = parser.parse_args().files
    model = ml.wrap(ml.load_tiny())
    rng = random.Random(0)
    episode = sample_episode(rng, n_demos=8)
    queries = [episode.query, *(sample_episode(rng, n_demos=0).query for _ in range(3))]
    prompts = [ml.ICLPrompt(episode.demos, query, candidates=episode.candidates) for query in queries]
    update = ml.finetune(model, prompts[0], lr=0.02)
    tasks = {
        "decompose": lambda: ml.decompose(model, prompts[0]),
        "compare": lambda: ml.compare(model, prompts, update, progress=False),
        "compare, no further runs": lambda: ml.compare(model, prompts, update, controls="quick", progress=False),
    }
    for name, task in tasks.items():
        task()  # warm: nothing is loaded or checked for the first time below
        files, switches = files_touched(task)
        print(f"{name}: {len(files)} files, {files.total()} calls, {switches} switches between files")
        if show:
            print(*(f"  {count:6} {file}" for file, count in sorted(files.items())), sep="\n")


if __name__ == "__main__":
    main()
