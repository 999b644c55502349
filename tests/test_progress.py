"""Progress of long work: lines in a log, a bar on a terminal, nothing where it is switched off."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

import pytest

from metaopt_lens._progress import Progress, duration

SCRIPT = """
import logging
logging.basicConfig(level=logging.INFO)
from metaopt_lens._progress import Progress
with Progress(3, "knock-outs", every=0.0) as progress:
    progress.advance(3)
"""


def test_lines_with_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "metaopt_lens"), Progress(3, "knock-outs", every=0.0) as progress:
        progress.advance(1)
        progress.advance(2)
    lines = [record.message for record in caplog.records]
    patterns = [r"1 of 3, about \d+ s left", r"3 of 3, about 0 s left", r"3 of 3 in \d+\.\d s"]
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch("knock-outs: " + pattern, line), line


def test_what_has_a_name_gets_a_line_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "metaopt_lens"), Progress(8, "run", every=1e9) as progress:
        progress.advance(6, "seed-0/gd")
    assert re.fullmatch(r"run: seed-0/gd, 75 %, about \d+ s left", caplog.records[0].message)


def test_lengths_of_time_in_words() -> None:
    assert [duration(s) for s in (0.2, 99.4, 99.6, 3600.0, 12_000.0)] == [
        "0 s",
        "99 s",
        "2 min",
        "60 min",
        "3 h 20 min",
    ]


def test_no_line_before_its_time_none_after_an_error_and_none_where_switched_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stops() -> None:
        with Progress(2, "runs", every=1e9) as progress:
            progress.advance()
            raise KeyError

    with caplog.at_level("INFO", "metaopt_lens"):
        with pytest.raises(KeyError):
            stops()
        with Progress(2, "runs", shown=False, every=0.0) as progress:
            progress.advance(2)
    assert not caplog.records


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=theirs, check=True)
    shown = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    assert "3/3" in shown
    assert "INFO" not in shown
