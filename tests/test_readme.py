"""The code that README.md shows runs as it stands, and its commands are those of the command line."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

import metaopt_lens
from metaopt_lens.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["split"], metaopt_lens.Decomposition)
    assert isinstance(names["update"], metaopt_lens.WeightUpdate)


def test_the_commands_exist() -> None:
    shown = set(re.findall(r"`metaopt-lens ([a-z-]+)", README))
    assert {"demo", "decompose", "compare", "run", "report"} <= shown
    assert shown <= set(get_command(app).commands)  # type: ignore[attr-defined]
