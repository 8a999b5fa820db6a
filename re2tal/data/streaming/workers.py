"""Worker processes of a stream: which signals end them, and the shared memory that they need."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers, and Ctrl-C, send to every process of a job that has to end. The trainer needs its workers a little
longer then, to reach the step after which all ranks save."""


def heed_only_the_parent(worker: int) -> None:
    """What a worker process does first: from then on these signals end it only where its parent sent them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    # Not simply ignored: multiprocessing ends a worker that hangs by SIGTERM, and then waits for its end.
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block them in this context. A process started here inherits that in all its threads, also in those that libraries
    start on import, before `heed_only_the_parent` is called."""
    ensure_running()  # multiprocessing's resource tracker: to start it inside would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_shared_memory(batch_bytes: int, *, workers: int, prefetch: int) -> None:
    """Workers hand batches over in /dev/shm; where it is too small, as in many containers, they die of bus errors."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    needed = workers * (prefetch + 1) * batch_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free >> 20} MiB free, {workers} workers with {prefetch} batches of "
            f"{batch_bytes >> 20} MiB each need {needed >> 20} MiB; enlarge it (docker run --shm-size=...), or "
            "lower data.clips.workers or data.clips.prefetch"
        )
