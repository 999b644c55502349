"""How far a long piece of work is: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

_BAR = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left{postfix}"


class Progress:
    """Shown on stderr: on a terminal one bar, elsewhere a line for everything that is finished, with the time left.

    Args:
        title: what is worked on.
        total: the work, in any unit.
        show: False for nothing at all.
    """

    def __init__(self, title: str, total: int, *, show: bool) -> None:
        self._title, self._total, self._done = title, total, 0
        self._begun = time.monotonic()
        self._as_lines = show and not sys.stderr.isatty()
        self._bar: Any = tqdm(total=total, desc=title, bar_format=_BAR, disable=not show or self._as_lines)

    def begin(self, name: str) -> None:
        """Say what is being worked on."""
        self._bar.set_postfix_str(name)

    def finish(self, name: str, share: int = 1, *, seconds: float | None = None) -> None:
        """Count what is finished.

        Args:
            name: of the piece.
            share: of the work.
            seconds: what it took; None if it was not made here, and then there is no line.
        """
        self._done += share
        self._bar.update(share)
        if self._as_lines and seconds is not None:
            elapsed = time.monotonic() - self._begun
            left = elapsed / self._done * (self._total - self._done)
            state = f"{self._done / self._total:.0%} done, about {duration(left)} left" if left else "all done"
            sys.stderr.write(f"{self._title}: {name} took {duration(seconds)}; {state}\n")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """A length of time as people say it: ``8 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
