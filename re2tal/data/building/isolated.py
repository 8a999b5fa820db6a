"""Run functions in a process that can be killed: for native code that may crash or never return.

A hang inside decord or FFmpeg cannot be interrupted from within: signal handlers wait for the native call to end.
A function that may take long calls `still_working` as it goes on, and is stopped only when it falls silent.
A generator's items come one by one, as they are asked for.
"""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from multiprocessing import spawn
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy whatever locks other threads hold at that moment
_NAME = "re2tal-isolated"
"""Begins the names of our processes."""
_NUMBERS = count()


# A message for each frame would cost more than some frames do.
_SIGN_SECONDS = 1.0
_to_parent: Connection | None = None
"""In the child process: the connection to the parent, which waits for the result."""
_last_sign = 0.0


def still_working() -> None:
    """Tell the parent that this call makes progress; does nothing outside of `Isolated`."""
    global _last_sign
    if _to_parent is not None and time.monotonic() - _last_sign > _SIGN_SECONDS:
        _last_sign = time.monotonic()
        _to_parent.send(None)


class IsolationError(ValueError):
    """The function did not return: its process died or had to be killed."""


class Isolated:
    """A child process, started on first use and restarted after it died.

    Use as a context manager, from one thread at a time. Functions must be importable by name.
    """

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def call(self, timeout_seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result or its exception.

        Raises IsolationError where the process died, or gave no sign of life for so many seconds.
        """
        self._ask(function, args, kwargs)
        succeeded, result = self._reply(timeout_seconds)
        if succeeded:
            return result
        raise result

    def iterate(
        self, timeout_seconds: float, function: Callable[P, Iterator[R]], *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[R]:
        """The items of a generator function, or its exception; errors as for `call`.

        One that is left before its end is stopped with its process.
        """
        self._ask(function, args, kwargs)
        ended = False
        try:
            while not ended:
                succeeded, result = self._reply(timeout_seconds)
                if succeeded is None:
                    yield result
                    continue
                ended = True
                if not succeeded:
                    raise result
        finally:
            if not ended:
                self._kill()

    def _ask(self, function: Callable, args: tuple, kwargs: dict) -> None:
        connection = self._start()
        try:
            connection.send((function, args, kwargs))
        except OSError:  # it died while nobody asked for anything: the new one is not to blame
            self._kill()
            connection = self._start()
            connection.send((function, args, kwargs))

    def _reply(self, timeout_seconds: float) -> tuple[bool | None, Any]:
        """Whether the function succeeded, and its result; None and an item where more is to come."""
        connection, reply = self._start(), None
        # None is a sign of life, and starts the wait anew.
        while reply is None:
            try:
                if not connection.poll(timeout_seconds):
                    self._kill()
                    raise IsolationError(f"gave no sign of life for {timeout_seconds:.0f} s and was stopped")
                reply = connection.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                exit_code = self._kill()
                raise IsolationError(f"its process died (exit code {exit_code})") from None
        return reply

    def _start(self) -> Connection:
        if self._connection is None:
            self._connection, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=_serve, args=(theirs,), name=f"{_NAME}-{next(_NUMBERS)}", daemon=True)
            self._process.start()
            theirs.close()  # else the end of the process would not end the connection
        return self._connection

    def _kill(self) -> int | None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return None
        connection.close()
        process.join(0.5 if process.exitcode is None else 0)  # an idle one leaves by itself
        process.kill()
        process.join()
        return process.exitcode


class IsolatedPool:
    """Child processes for the threads of a caller: each call takes one that is free, or waits for one."""

    def __init__(self, num_processes: int) -> None:
        self._stack = ExitStack()
        self._free: SimpleQueue[Isolated] = SimpleQueue()
        for _ in range(num_processes):
            self._free.put(self._stack.enter_context(Isolated()))

    def __enter__(self) -> IsolatedPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def call(self, timeout_seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `Isolated.call`."""
        isolated = self._free.get()
        try:
            return isolated.call(timeout_seconds, function, *args, **kwargs)
        finally:
            self._free.put(isolated)


def _preparation_data(name: str) -> dict[str, Any]:
    """As multiprocessing's own, but a process of ours does not run the user's script again, which needs no guard."""
    data = _usual_preparation_data(name)
    if name.startswith(_NAME):
        data.pop("init_main_from_name", None)
        data.pop("init_main_from_path", None)
    return data


# multiprocessing has no option for it; only processes of our names are concerned.
_usual_preparation_data = spawn.get_preparation_data
spawn.get_preparation_data = _preparation_data


def _serve(connection: Connection) -> None:
    global _to_parent
    _to_parent = connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            result = function(*args, **kwargs)
            if inspect.isgenerator(result):
                for item in result:
                    _send(connection, (None, item))
                result = None
            reply = True, result
        except Exception as error:
            reply = False, error
        try:
            _send(connection, reply)
        except OSError:  # nobody wants it any more
            return


def _send(connection: Connection, message: tuple[bool | None, Any]) -> None:
    # Not by `send`: where the other side has closed, Python 3.12 writes a SystemError of its buffer to stderr.
    connection.send_bytes(pickle.dumps(message))
