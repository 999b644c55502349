"""Code that README.md and the pages under docs/ show: which of it runs here, which needs SmolLM2, which is not run.

A fence ``python`` or ``sh`` is run, in the order of the page. ``<!-- file: NAME -->`` before a fence makes it a file
that commands read; ``<!-- not run: REASON -->`` exempts it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from metaopt_lens.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Made from tables by docs/_results.py: their commands are runs of hours.
_GENERATED = {"docs/results.md", "docs/claims.md"}
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.relative_to(ROOT).as_posix() not in _GENERATED
]
_FENCE = re.compile(r"^(?:<!-- (not run|file): ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PRETRAINED = re.compile(r"""smollm2(?!==)|gemma3-270m""")


@dataclass(frozen=True)
class Block:
    """A fence of a page.

    Attributes:
        language: ``"python"``, ``"sh"``, another one, or ``""``.
        code: its text.
        file: the name of the file that it is, if it is one.
        not_run: why it is not run, if it is not.
    """

    language: str
    code: str
    file: str | None = None
    not_run: str | None = None

    @property
    def pretrained(self) -> bool:
        """Whether it needs the weights of a pretrained model."""
        return any(not line.startswith("pip ") and _PRETRAINED.search(line) for line in self.code.splitlines())

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, without comments."""
        return [line.split("  #")[0].strip() for line in self.code.splitlines() if line.strip()]


def blocks_of(text: str) -> list[Block]:
    """All fences of a page, in their order."""
    found = []
    for mark, said, language, code in _FENCE.findall(text):
        found.append(Block(language, code, said if mark == "file" else None, said if mark == "not run" else None))
    return found


def to_run(text: str, language: str, *, pretrained: bool) -> list[Block]:
    """The fences of one language that are run, on the bundled model or on a pretrained one."""
    return [
        block
        for block in blocks_of(text)
        if block.language == language
        and block.file is None
        and block.not_run is None
        and block.pretrained is pretrained
    ]


def files_of(text: str) -> dict[str, str]:
    """The files that a page shows, by name."""
    return {block.file: block.code for block in blocks_of(text) if block.file}


def run_commands(text: str, *, pretrained: bool) -> None:
    """Run a page's commands in the working directory, next to the files that it shows.

    Lines of pip are left out; any other program than metaopt-lens is an error.
    """
    for name, content in files_of(text).items():
        Path(name).write_text(content, encoding="utf-8")
    for block in to_run(text, "sh", pretrained=pretrained):
        for command in block.commands:
            program, *arguments = shlex.split(command)
            if program == "pip":
                continue
            assert program == "metaopt-lens", f"{command!r} is not run: mark it <!-- not run: REASON -->"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{command}: {result.output} {result.exception!r}"
