"""How far a command is, and how long it will still take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

FIRST_LINE_SECONDS = 1.0
MOST_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Counts work of any unit up to `total`; lines come ever more seldom, after 1, 2, 4, ... 60 seconds."""

    def __init__(
        self,
        total: float,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = 0.0
        self._shown = shown
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = clock()
        self._next_line = FIRST_LINE_SECONDS
        self._bar = None
        if shown and self._stream.isatty():
            layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}  {desc}"
            self._bar = tqdm(total=total, file=self._stream, bar_format=layout, leave=False)

    def to(self, done: float, about: str) -> None:
        """So much is done; `about` says what is at work."""
        self.done = min(max(done, self.done), self.total)
        if self._bar is not None:
            self._bar.set_description_str(about, refresh=False)
            self._bar.update(self.done - self._bar.n)
            return
        elapsed = self._clock() - self._start
        if self._shown and elapsed >= self._next_line:
            self._next_line = elapsed + min(MOST_SECONDS_BETWEEN_LINES, max(FIRST_LINE_SECONDS, elapsed))
            print(f"{self._line(elapsed)}: {about}", file=self._stream, flush=True)

    def _line(self, elapsed: float) -> str:
        share = self.done / self.total if self.total else 1.0
        left = f"about {clock_time(elapsed * (1 - share) / share)} left" if share else "time left not known yet"
        return f"{share:4.0%} after {clock_time(elapsed)}, {left}"

    def say(self, text: str) -> None:
        """Print to stdout, beside a bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def clock_time(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
