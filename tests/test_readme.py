"""The code that README.md shows runs as it stands, and its commands are those of the command line.

What it shows on a pretrained model is run by tests/real/test_real_readme.py.
"""

from __future__ import annotations

import re

from readme import BUNDLED_BLOCKS, README
from typer.main import get_command

import metaopt_lens
from metaopt_lens.cli import app


def test_the_code_runs() -> None:
    (code,) = BUNDLED_BLOCKS
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["split"], metaopt_lens.Decomposition)
    assert isinstance(names["update"], metaopt_lens.WeightUpdate)


def test_the_commands_exist() -> None:
    shown = set(re.findall(r"`metaopt-lens ([a-z-]+)", README))
    assert {"demo", "decompose", "compare", "compile", "run", "report"} <= shown
    assert shown <= set(get_command(app).commands)  # type: ignore[attr-defined]
