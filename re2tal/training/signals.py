"""Signals that ask a run to stop. A handler must not save a checkpoint, which takes all ranks: it takes a note."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Inside, SIGTERM, SIGUSR1 and SIGINT append their number to the list, which the loop reads between two steps.

    A second SIGINT, Ctrl-C of someone who will not wait, is a KeyboardInterrupt.
    """
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in requests:
            raise KeyboardInterrupt
        requests.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
