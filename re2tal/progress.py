"""How far a command is, and how long it will still take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

FIRST_LINE_SECONDS = 1.0
MOST_SECONDS_BETWEEN_LINES = 60.0
BAR_SECONDS = 0.1
"""A bar is drawn again at most this often."""


class Progress:
    """Counts work of any unit up to `total`; lines come ever more seldom, after 1, 2, 4, ... 60 seconds."""

    def __init__(
        self,
        total: float,
        *,
        start: float = 0.0,
        shown: bool = True,
        lines: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start`: what was done before; `lines`: print lines where there is no terminal for a bar.

        `total` may be set anew once it is known.
        """
        self.total = total
        self.done = self._before = start
        self._lines = shown and lines
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = self._drawn = clock()
        self._next_line = FIRST_LINE_SECONDS
        self._bar = _Bar(self._stream) if shown and is_terminal(self._stream) else None

    @property
    def has_bar(self) -> bool:
        """Whether there is a terminal that shows a bar."""
        return self._bar is not None

    def to(self, done: float, about: str) -> None:
        """So much is done; `about` says what is at work."""
        about = printable(about)
        self.done = min(max(done, self.done), self.total)
        now = self._clock()
        elapsed = now - self._start
        if self._bar is not None:
            if now - self._drawn >= BAR_SECONDS or self.done == self.total:
                self._drawn = now
                self._bar.draw(self.done, self.total, f"{clock_time(elapsed)}, {self.left()}  {about}")
        elif self._lines and elapsed >= self._next_line and self.done < self.total:
            self._next_line = elapsed + min(MOST_SECONDS_BETWEEN_LINES, max(FIRST_LINE_SECONDS, elapsed))
            line = f"{self.done / self.total:4.0%} after {clock_time(elapsed)}, {self.left()}: {about}"
            print(line, file=self._stream, flush=True)

    def left(self) -> str:
        """The time that the rest will take, at the speed so far."""
        done, rest = self.done - self._before, self.total - self.done
        if not rest:
            return "about 0:00 left"
        if not done:
            return "time left not known yet"
        return f"about {clock_time((self._clock() - self._start) * rest / done)} left"

    def say(self, text: str, *, file: TextIO | None = None) -> None:
        """Print a line above the bar, to stdout by default."""
        if self._bar is None:
            print(text, file=file, flush=True)
        else:
            self._bar.say(text, file)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def counted(items: Iterable[T], *, total: int, about: str, shown: bool = True) -> Iterator[T]:
    """The items as they come, with their progress."""
    progress = Progress(total, shown=shown)
    try:
        for done, item in enumerate(items, start=1):
            progress.to(done, about)
            yield item
    finally:
        progress.close()


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn there, again and again in one place."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class _Bar:
    """Drawn when it is told to, and by no thread: a worker that is forked must not inherit a lock of one."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        rest = Column(overflow="crop", ratio=1)
        self._stream = stream
        self._rich = RichProgress(
            TextColumn("{task.percentage:3.0f}%"),
            BarColumn(bar_width=12),
            TextColumn("{task.description}", markup=False, table_column=rest),
            console=Console(file=stream, force_terminal=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            expand=True,
        )
        self._task: Any = self._rich.add_task("", total=None)
        self._rich.start()

    def draw(self, done: float, total: float, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        self._rich.update(self._task, completed=done, total=total, description=text, refresh=True)

    def say(self, text: str, file: TextIO | None) -> None:
        self._rich.stop()
        print(text, file=file, flush=True)
        self._rich.start()

    def close(self) -> None:
        self._rich.stop()


def printable(text: str) -> str:
    """Without characters that would steer a terminal."""
    return "".join(one if one.isprintable() else "?" for one in text)


def clock_time(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
