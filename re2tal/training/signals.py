"""Signals that ask a run to stop. A handler must not save a checkpoint, which takes all ranks: it takes a note.

    signal -> the C handler writes a byte -> a thread reads it, notes it, and ends the process at the third
                                             all ranks look at their notes together: see `interruption`

The thread runs while the main one waits in a collective or a decoder, where no handler of Python's would.
Imports nothing heavy: a run listens before it imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
)
"""Windows has only the first two."""
ENDS_AT_ONCE = 3
"""So many requests: whoever sends them will not wait for a checkpoint."""
ONE_REQUEST_SECONDS = 0.1
"""Signals closer together are one request: of a terminal, which reaches ranks directly and through their launcher."""
# A real-time signal, which no scheduler and no terminal sends; macOS has none.
PARENT_IS_GONE = getattr(signal, "SIGRTMIN", signal.SIGTERM)
"""What the system sends a rank whose launcher died. It never counts as somebody's impatience."""


class StopRequests:
    """True once the process was told to stop."""

    def __init__(self) -> None:
        self.count = 0
        self._told = threading.Event()
        self._last = -ONE_REQUEST_SECONDS

    def __bool__(self) -> bool:
        return self._told.is_set()

    def add(self) -> None:
        """A request that does not count towards the third, which ends the process."""
        self._told.set()

    def _hear(self, number: int) -> None:
        self._told.set()
        now = time.monotonic()
        if number == PARENT_IS_GONE or now - self._last < ONE_REQUEST_SECONDS:
            return
        self.count, self._last = self.count + 1, now
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        what = (
            "the run saves and stops"
            if self.count == 1
            else "it is saving; a third signal ends it at once"
            if self.count < ENDS_AT_ONCE
            else "the third request: this process ends at once"
        )
        print(f"{rank}{signal.Signals(number).name}: {what}", file=sys.stderr, flush=True)
        if self.count >= ENDS_AT_ONCE:
            # As shells report a process that a signal ended. Not sys.exit, which would only end this thread.
            os._exit(128 + number)


_listening: StopRequests | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Inside, SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP are requests to stop; the third ends the process at once.

    Nested contexts share their requests. Outside the main thread, where Python sets no handlers, nothing is heard.
    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    global _listening
    if _listening is not None:
        yield _listening
        return
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    hangup = getattr(signal, "SIGHUP", None)
    numbers = [n for n in STOP_SIGNALS if n != hangup or signal.getsignal(n) != signal.SIG_IGN]
    reader, writer = socket.socketpair()
    # Python demands it: a C handler that waited for the reader would stop the process.
    writer.setblocking(False)
    listener = threading.Thread(target=_listen, args=(reader, requests, {*numbers, PARENT_IS_GONE}), daemon=True)
    listener.start()
    earlier_fd = signal.set_wakeup_fd(writer.fileno())
    # A handler of Python's has to be set, or the system's default ends the process. It may also run before the thread
    # does, so it takes the note too.
    previous = {number: signal.signal(number, lambda *_: requests.add()) for number in {*numbers, PARENT_IS_GONE}}
    _listening = requests
    try:
        yield requests
    finally:
        _listening = None
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_fd)
        writer.shutdown(socket.SHUT_RDWR)  # closed alone, it would stay open in each process that was forked meanwhile
        writer.close()
        listener.join()
        reader.close()


def ask_to_stop() -> None:
    """What a thread of this process calls that knows a reason to stop."""
    if _listening is None:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        _listening.add()


def _listen(reader: socket.socket, requests: StopRequests, numbers: set[int]) -> None:
    while received := reader.recv(64):
        for number in received:
            if number in numbers:
                requests._hear(number)


def _forget_in_child() -> None:
    # A forked child shares the socket: a signal to it would count as one to its parent.
    if _listening is not None:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
