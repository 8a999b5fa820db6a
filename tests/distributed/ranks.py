"""Runs a function, or any command, as N ranks on this machine: gloo, CPU, a free port, one process group per rank.

A function's ranks are forks of processes that have imported torch and DeepSpeed already: imports take longer than most
of what is tested. Each number of rank has its own such process, with its own order of sets, as on several machines.

    results = run_ranks(train, world_size=2, stage=3)      # train(stage=3) in every rank; one result per rank

The function must be at the top level of its file (the ranks load that file by path), take JSON values as keyword
arguments, and return what `torch.load(weights_only=True)` reads: tensors, numbers, strings, dicts and lists of them.
It finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment and starts its own process group;
it need not leave it.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import inspect
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = float(os.environ.get("RE2TAL_TEST_PATIENCE", "1"))
"""How many times as long as usual to wait: more than 1 on a machine that other jobs use too."""


def run_ranks(function: Callable[..., Any], *, world_size: int, timeout_seconds: float = 120, **arguments: Any) -> list:
    """`function(**arguments)` in `world_size` processes; what each returned, in order of rank.

    RuntimeError with the output of the ranks if one fails or the time is up.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = [inspect.getfile(function), function.__qualname__, json.dumps(arguments), folder]
        shared = _shared_environment(world_size)
        servers = [_server(rank, shared) for rank in range(world_size)]
        _watch(
            lambda rank, log: _Fork(servers[rank], {**shared, **_of_rank(rank)}, log, call),
            world_size=world_size,
            timeout_seconds=timeout_seconds,
            what=f"{function.__module__}.{function.__qualname__}",
        )
        return [torch.load(_result(folder, rank), weights_only=True) for rank in range(world_size)]


def launch_ranks(
    command: Sequence[str],
    *,
    world_size: int,
    timeout_seconds: float = 120,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """`command` in `world_size` processes that can find each other; the output of each, in order of rank.

    RuntimeError with the output of the ranks if one fails or the time is up; no process outlives the call.
    """
    shared = {**_shared_environment(world_size), **(environment or {})}

    def start(rank: int, log: Path) -> subprocess.Popen:
        with log.open("w") as output:
            return subprocess.Popen(
                command,
                env={**shared, **_of_rank(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that _end reaches the rank's own children too
            )

    return _watch(start, world_size=world_size, timeout_seconds=timeout_seconds, what=" ".join(command))


def free_port() -> int:
    """A TCP port that nobody listens on just now, and that no connection nor a neighbour of this process is given.

    The system gives connections ports from 32768 on, and pytest-xdist's workers each choose among 1000 of their own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20000 + 1000 * (worker % 9), 21000 + 1000 * (worker % 9))
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"none of the TCP ports {ports} is free")


def _shared_environment(world_size: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _of_rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _watch(
    start: Callable[[int, Path], subprocess.Popen | _Fork], *, world_size: int, timeout_seconds: float, what: str
) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        processes: list[subprocess.Popen | _Fork] = []
        try:
            processes += [start(rank, log) for rank, log in enumerate(logs)]
            failure = _wait(processes, timeout_seconds)
        finally:
            for process in processes:
                _end(process)
        outputs = [log.read_text(errors="replace") for log in logs]
    if failure:
        tails = "".join(f"\n--- rank {rank}\n{output[-4000:]}" for rank, output in enumerate(outputs))
        raise RuntimeError(f"{failure}: {what}{tails}")
    return outputs


def _wait(processes: Sequence[subprocess.Popen | _Fork], timeout_seconds: float) -> str:
    """What went wrong, or "" if all ended well. A failed rank leaves the others waiting: do not wait for them."""
    deadline = time.monotonic() + PATIENCE * timeout_seconds
    while True:
        codes = [process.poll() for process in processes]
        failed = [f"rank {rank} ended with {code}" for rank, code in enumerate(codes) if code]
        if failed or None not in codes:
            return ", ".join(failed)
        if time.monotonic() > deadline:
            return f"not done after {PATIENCE * timeout_seconds:g} s"
        time.sleep(0.05)


def _end(process: subprocess.Popen | _Fork) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it may have ended just now
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"


class _Fork:
    """A rank that a server forked, with what is needed here of Popen's interface."""

    def __init__(self, server: subprocess.Popen, environment: Mapping[str, str], log: Path, call: list[str]) -> None:
        assert server.stdin is not None
        self._answers = server.stdout
        order = {"environment": environment, "log": str(log), "cwd": os.getcwd(), "call": call}
        server.stdin.write(json.dumps(order).encode() + b"\n")
        self.pid = int(self._answers.readline())  # type: ignore[union-attr]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            answer = self._answers.readline()  # type: ignore[union-attr]
            if not answer:  # the server is gone, so that nobody learns how its rank ends
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self.returncode = int(answer or -signal.SIGKILL)
        return self.returncode


_servers: dict[int, tuple[dict[str, str], subprocess.Popen]] = {}
"""By number of rank: the environment that it was started in, and the process."""


def _server(rank: int, environment: Mapping[str, str]) -> subprocess.Popen:
    """The process that forks this rank; a new one if it would have read other variables when it imported things."""
    own = ("MASTER_PORT", "WORLD_SIZE", "LOCAL_SIZE", "PYTEST_CURRENT_TEST")
    read = {name: value for name, value in environment.items() if name not in own}
    started_in, server = _servers.get(rank, ({}, None))
    if server is None or started_in != read or server.poll() is not None:
        if server is not None:
            server.communicate()  # the end of its input ends it
        server = subprocess.Popen(
            [sys.executable, __file__],
            env=read,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        _servers[rank] = (read, server)
    return server


@atexit.register
def _end_servers() -> None:
    for _, server in _servers.values():
        server.communicate()


def _become_a_rank() -> list[str]:
    """Forks for each line of standard input, and returns the call in the fork. Answers its pid, then its status."""
    import numpy
    import pytest  # noqa: F401
    import transformers  # noqa: F401

    import re2tal.runs.training_run
    import re2tal.training.trainer  # noqa: F401

    gc.freeze()  # a collection in a fork would write to, and so copy, every page of what was imported
    assert len(os.listdir("/proc/self/task")) == 1, "a process that has threads cannot be forked safely"
    for line in sys.stdin:
        if pid := os.fork():
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        order = json.loads(line)
        os.setsid()  # so that _end reaches the rank's own children too
        print(os.getpid(), flush=True)
        with open(os.devnull) as nothing, open(order["log"], "w") as log:
            for file, number in ((nothing, 0), (log, 1), (log, 2)):
                os.dup2(file.fileno(), number)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["environment"])
        random.seed()
        numpy.random.seed()
        torch.seed()  # else all ranks that one server forks draw the same, and two runs agree that nobody seeded
        return order["call"]
    sys.exit()


def _run_one_rank(path: str, name: str, arguments: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of that file look their module up by name
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])  # here: the function may take it out of the environment
    result = getattr(module, name)(**json.loads(arguments))
    torch.save(result, _result(folder, rank))
    if torch.distributed.is_initialized():
        from re2tal.training.process_group import leave  # here: it imports DeepSpeed, which few ranks need

        leave()
    # What was imported is not taken apart: it takes a second, and ranks that end as they do for users are in tests/cli.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _run_one_rank(*_become_a_rank())
