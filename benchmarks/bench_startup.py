"""How long one waits: for the help text, for the import, for the demo.

    python benchmarks/bench_startup.py

Fresh processes, interleaved, medians of wall and of processor time. Exits 1 if `metaopt-lens --help` loads torch, if
importing metaopt_lens beside transformer_lens costs more than 1.10 times importing transformer_lens alone, or if
`metaopt-lens demo` takes more than twice that import.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_IMPORT, MAX_DEMO = 1.10, 2.0
RUN = "import sys; from metaopt_lens.cli import main; sys.argv = ['metaopt-lens', *{arguments!r}]; main()"
HOST = "import transformer_lens"
BOTH = "import metaopt_lens, transformer_lens"


def run(code: str) -> tuple[float, float, str]:
    """Seconds of wall and processor time of a fresh interpreter, and what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "BROWSER": "true"}
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder, check=False
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{code}\nended with {done.returncode}:\n{done.stderr}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, processor, done.stdout


def main() -> int:
    """Measure, print, and say whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    codes = {"transformer_lens": HOST, "both": BOTH, "help": RUN.format(arguments=["--help"])}
    if (Path(__file__).parents[1] / "metaopt_lens" / "cli").is_dir():
        codes["demo"] = RUN.format(arguments=["demo"])
    for code in codes.values():
        run(code)  # byte code and file cache
    found = [{name: run(code)[:2] for name, code in codes.items()} for _ in range(rounds)]
    wall = {name: statistics.median(f[name][0] for f in found) for name in codes}

    def ratio(name: str, kind: int) -> float:
        return statistics.median(f[name][kind] / f["transformer_lens"][kind] for f in found)

    for name, value in wall.items():
        print(f"{name:17} {value:6.2f} s")
    probe = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {codes['help']}"
    loads_torch = run(probe)[2].split()[-1] == "True"
    print(f"metaopt-lens --help loads torch: {loads_torch} (must be False)")
    met = not loads_torch
    for name, most in (("both", MAX_IMPORT), ("demo", MAX_DEMO)):
        if name not in codes:
            continue
        print(f"{name} / transformer_lens: {ratio(name, 0):.3f} (at most {most}; CPU {ratio(name, 1):.3f})")
        met = met and ratio(name, 0) <= most
    print("met" if met else "MISSED")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
