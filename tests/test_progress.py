"""Lines of progress, by a clock of the test's own."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress

import pytest

from re2tal.progress import Progress, clock_time


def test_lines_come_after_a_second_and_then_more_seldom_with_the_time_left() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(1000, stream=stream, clock=lambda: now[0])
    for second in range(1, 301):
        now[0] = second
        progress.to(2 * second, "party")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  0% after 0:01, about 8:19 left: party"
    assert lines[-1] == " 49% after 4:04, about 4:16 left: party"
    assert len(lines) == 10


def test_nothing_is_shown_where_nobody_looks_and_times_are_read_easily() -> None:
    stream = io.StringIO()
    progress = Progress(0, shown=False, stream=stream)
    progress.to(5, "x")
    progress.close()
    assert stream.getvalue() == ""
    assert [clock_time(one) for one in (0.4, 75, 3723)] == ["0:00", "1:15", "1:02:03"]


class Terminal(io.StringIO):
    """A stream that says it is one."""

    encoding = "ascii"

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return super().write(text.encode(self.encoding).decode(self.encoding))  # as a terminal would fail


def test_a_bar_stands_on_a_terminal_of_any_encoding_and_lines_above_it(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    now, stream = [0.0], Terminal()
    progress = Progress(1, start=20, stream=stream, clock=lambda: now[0])
    progress.total = 40
    for step in range(21, 31):
        now[0] += 2
        progress.to(step, "step … [bold]" + 100 * "x")
    progress.say("résumé", file=None)
    progress.close()
    assert progress.has_bar
    assert " 75%" in stream.getvalue()
    assert "0:20, about 0:20 left  step ? [bold]" in stream.getvalue()  # as fast as the ten steps of this process
    assert capsys.readouterr().out == "résumé\n"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_wishes_of_the_user_are_kept(name, value, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, value)
    stream = Terminal()
    progress = Progress(2, stream=stream)
    progress.to(2, "done")
    progress.close()
    assert progress.has_bar == (name != "TERM")
    assert not re.search(r"\x1b\[[0-9;]*m", stream.getvalue().replace("\x1b[0m", ""))


def test_a_bar_lives_through_a_terminal_that_changes_its_size() -> None:
    """In a real pseudo-terminal that is not UTF-8: no error, and lines that are said stand whole."""
    code = """
import sys, time
from re2tal.progress import Progress
progress = Progress(30)
for step in range(1, 31):
    progress.to(step, f"step {step}/30  loss 0.5 \\u2026")
    if step % 10 == 0:
        progress.say(f"said {step}", file=sys.stderr)
    time.sleep(0.02)
progress.close()
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    widths = itertools.cycle((100, 20, 7, 60))
    with suppress(OSError):  # the end of a pseudo-terminal
        while piece := os.read(ours, 4096):
            shown += piece
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, next(widths), 0, 0))
    assert process.wait(timeout=30) == 0
    text = shown.decode("ascii")
    assert "Traceback" not in text
    assert [line for line in ("said 10", "said 20", "said 30") if line not in text] == []
