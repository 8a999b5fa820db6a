"""What other processes run; in a module of its own, so that spawned ones find it."""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection

from re2tal.data.building.isolated import still_working
from re2tal.data.streaming.workers import heed_only_the_parent


def ready_worker(connection: Connection) -> None:
    """Says that it is ready, then sends back what it is sent."""
    heed_only_the_parent()
    connection.send("ready")
    while True:
        connection.send(connection.recv())


def slow_but_working(seconds: float) -> str:
    """Takes its time, and says so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        still_working()
        time.sleep(0.05)
    return "done"


def interrupted(job: tuple[str, int]) -> int:
    """Meets Ctrl-C, as all processes of a terminal do."""
    signal.raise_signal(signal.SIGINT)
    return job[1]
