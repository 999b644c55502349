"""Progress of long work: a bar on a terminal; elsewhere lines with the time left, in the log `metaopt_lens`."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

LOG = logging.getLogger("metaopt_lens")


class Progress:
    """Counts finished pieces of work; use it as a context.

    Args:
        total: how many pieces there are.
        what: what is done, such as ``"knock-outs"``.
        shown: False for no bar and no line.
        every: seconds between lines.
    """

    def __init__(self, total: int, what: str, *, shown: bool = True, every: float = 30.0) -> None:
        self._total, self._what, self._every = total, what, every
        self._done = 0.0
        self._start = self._last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._logs = shown and not on_terminal
        self._bar = tqdm(total=total, desc=what, disable=not (shown and on_terminal))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._logs and error is None:
            seconds = time.monotonic() - self._start
            LOG.info("%s: %.0f of %d in %.1f s", self._what, self._done, self._total, seconds)

    def advance(self, n: int | float = 1, name: str | None = None) -> None:
        """Say that pieces of work are finished.

        Args:
            n: how many, in fractions where a piece is half done.
            name: of what is finished; then it gets a line of its own at once.
        """
        self._done += n
        self._bar.set_postfix_str(name or "", refresh=False)
        self._bar.update(n)
        now = time.monotonic()
        if self._logs and self._done and (name is not None or now - self._last_line >= self._every):
            self._last_line = now
            left = duration((now - self._start) / self._done * (self._total - self._done))
            if name is None:
                LOG.info("%s: %.0f of %d, about %s left", self._what, self._done, self._total, left)
            else:
                LOG.info("%s: %s, %.0f %%, about %s left", self._what, name, 100 * self._done / self._total, left)


def duration(seconds: float) -> str:
    """A length of time as people say it: ``8 s``, ``12 min``, ``3 h 20 min``.

    Args:
        seconds: the length.
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
