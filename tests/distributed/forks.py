"""Python processes that start with torch and DeepSpeed imported: imports take longer than most of what is tested.

    process = Fork([sys.executable, "launch/train.py", ...], server=0, environment={...}, log=Path("log"))
    process.wait()

Each is a fork of a server, which has imported what a training imports and nothing else. `server` tells servers apart:
ranks that are neighbours take different ones, and so have other orders of sets, as on several machines. What a process
does at its real start and end is not seen so: tests of that use `subprocess`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

OWN = (
    "MASTER_PORT",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "RANK",
    "LOCAL_RANK",
    "TORCH_EXTENSIONS_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "PYTEST_CURRENT_TEST",
)
"""Variables that nothing reads when it is imported: one server does for all their values."""
LONGEST_ORDER = 1 << 20


class Fork:
    """A process of the command, with what tests use of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], *, server: int, environment: Mapping[str, str], log: Path) -> None:
        """`command` is sys.executable with -c, -m or a script; what the process says is added to `log`."""
        assert command[0] == sys.executable, command
        log.touch()
        order = {"command": command[1:], "environment": environment, "log": str(log), "cwd": os.getcwd()}
        data = json.dumps(order).encode()
        assert len(data) < LONGEST_ORDER
        self._answers, theirs = socket.socketpair()
        prepare([server], environment)
        with theirs:
            socket.send_fds(_servers[server].orders, [data], [theirs.fileno()])
        self._file = self._answers.makefile("r")
        self.pid = int(self._file.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, -N for signal N, or None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same when it has ended; subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            answer = self._file.readline()
            if not answer:  # whoever waits for it is gone, so that nobody learns how it ends
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self.returncode = int(answer or -signal.SIGKILL)
            self._file.close()
            self._answers.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, without its children."""
        self.send_signal(signal.SIGKILL)


def prepare(numbers: Iterable[int], environment: Mapping[str, str]) -> None:
    """Returns when servers with these numbers take orders, so that forks of them start at one time.

    A server that would have read other variables when it imported things is replaced.
    """
    read = {name: value for name, value in environment.items() if name not in OWN}
    started = [number for number in dict.fromkeys(numbers) if not _serves(number, read)]
    for number in started:
        _end_server(number)
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        orders.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LONGEST_ORDER)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=read,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        _servers[number] = _Server(read, process, orders)
    for number in started:
        assert _servers[number].orders.recv(16), "a server ended before it took orders"


@dataclass(frozen=True)
class _Server:
    read: dict[str, str]
    """The environment that it was started in."""
    process: subprocess.Popen
    orders: socket.socket


_servers: dict[int, _Server] = {}


def _serves(number: int, read: Mapping[str, str]) -> bool:
    server = _servers.get(number)
    return server is not None and server.read == read and server.process.poll() is None


def _end_server(number: int) -> None:
    if server := _servers.pop(number, None):
        server.orders.close()  # which ends it
        server.process.wait()


@atexit.register
def _end_servers() -> None:
    for number in list(_servers):
        _end_server(number)


def _serve(orders: socket.socket) -> list[str]:
    """Forks for each order, and returns its command in the fork. Never returns in the server."""
    _import_what_a_training_does()
    gc.freeze()  # a collection in a fork would write to, and so copy, every page of what was imported
    assert len(os.listdir("/proc/self/task")) == 1, "a process that has threads cannot be forked safely"
    orders.send(b"ready")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the forks
    while True:
        data, handles, _, _ = socket.recv_fds(orders, LONGEST_ORDER, 1)
        if not data:
            sys.exit()
        if os.fork():
            os.close(handles[0])
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        orders.close()
        return _fork(json.loads(data), socket.socket(fileno=handles[0]))


def _fork(order: dict, answers: socket.socket) -> list[str]:
    """Forks once more: waits for the fork and tells its pid and its status, and returns its command in it."""
    if pid := os.fork():
        answers.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):  # whoever asked may be gone
            answers.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    answers.close()
    os.setsid()  # so that killpg reaches its own children too
    with open(os.devnull) as nothing, open(order["log"], "a") as log:
        for file, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(file.fileno(), number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    _seed()
    return order["command"]


def _import_what_a_training_does() -> None:
    """All that one imports until it ends: torch's optimizers, DeepSpeed's engine and the logs import more when used."""
    import accelerate  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.utils.tensorboard  # noqa: F401
    import transformers  # noqa: F401

    import re2tal.cli.train
    import re2tal.runs.detection_job
    import re2tal.training.trainer  # noqa: F401


def _seed() -> None:
    """Else all that one server forks would draw the same, and two runs agree that nobody seeded."""
    import numpy
    import torch

    random.seed()
    numpy.random.seed()
    torch.seed()


def _run(command: Sequence[str]) -> NoReturn:
    """As the interpreter would, to the end, but for taking apart what was imported: that takes a second."""
    options = list(command)
    while options[0] == "-u":
        options.pop(0)
    try:
        match options:
            case ["-c", code, *rest]:
                sys.argv, sys.path[0] = ["-c", *rest], ""
                sys.modules["__main__"] = main = ModuleType("__main__")
                exec(compile(code, "<string>", "exec"), vars(main))
            case ["-m", module, *rest]:
                sys.argv, sys.path[0] = [module, *rest], os.getcwd()
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [script, *rest]:
                sys.argv, sys.path[0] = [script, *rest], str(Path(script).parent)
                runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code not in (None, status):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
