"""Runs a function, or a Python command, as N ranks on this machine: gloo, CPU, a free port, one process group per rank.

Ranks are forks of processes that have imported torch and DeepSpeed already, see forks.py.

    results = run_ranks(train, world_size=2, stage=3)      # train(stage=3) in every rank; one result per rank

The function must be at the top level of its file (the ranks load that file by path), take JSON values as keyword
arguments, and return what `torch.load(weights_only=True)` reads: tensors, numbers, strings, dicts and lists of them.
It finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment and starts its own process group;
it need not leave it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from distributed.forks import Fork, prepare

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = float(os.environ.get("RE2TAL_TEST_PATIENCE", "1"))
"""How many times as long as usual to wait: more than 1 on a machine that other jobs use too."""


def run_ranks(
    function: Callable[..., Any],
    *,
    world_size: int,
    timeout_seconds: float = 120,
    namespaces_of: int | None = None,
    **arguments: Any,
) -> list:
    """`function(**arguments)` in `world_size` processes; what each returned, in order of rank.

    They see the users and disks of the process with the number `namespaces_of`, if one is given.

    RuntimeError with the output of the ranks if one fails or the time is up.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = [inspect.getfile(function), function.__qualname__, json.dumps(arguments), folder]
        call += [] if namespaces_of is None else [str(namespaces_of)]
        _watch(
            _forks([sys.executable, __file__, *call], environments(world_size)),
            world_size=world_size,
            timeout_seconds=timeout_seconds,
            what=f"{function.__module__}.{function.__qualname__}",
        )
        return [torch.load(_result(folder, rank), weights_only=True) for rank in range(world_size)]


def launch_ranks(command: Sequence[str], *, world_size: int, timeout_seconds: float = 120) -> list[str]:
    """The Python `command` in `world_size` processes that can find each other; the output of each, in order of rank.

    RuntimeError with the output of the ranks if one fails or the time is up; no process outlives the call.
    """
    return _watch(
        _forks(command, environments(world_size)),
        world_size=world_size,
        timeout_seconds=timeout_seconds,
        what=" ".join(command),
    )


def _forks(command: Sequence[str], told: Sequence[Mapping[str, str]]) -> Callable[[int, Path], Fork]:
    prepare([server_of(rank) for rank in range(len(told))], told[0])
    return lambda rank, log: Fork(command, server=server_of(rank), environment=told[rank], log=log)


def server_of(rank: int) -> int:
    """Two are enough for neighbours to differ, and each takes seconds to start."""
    return rank % 2


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


def environments(world_size: int, **more: str) -> list[dict[str, str]]:
    """Of the ranks of a new world, with a port of its own: what a launcher and this machine's tests tell them."""
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _watch(start: Callable[[int, Path], Fork], *, world_size: int, timeout_seconds: float, what: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        processes: list[Fork] = []
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


def _wait(processes: Sequence[Fork], timeout_seconds: float) -> str:
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


def _end(process: Fork) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):  # it may have ended just now
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"


def _enter_namespaces_of(process: str) -> None:
    with open(f"/proc/{process}/ns/user") as users, open(f"/proc/{process}/ns/mnt") as disks:
        for namespace in (users, disks):
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace.name)


def _run_one_rank(path: str, name: str, arguments: str, folder: str, *namespaces_of: str) -> None:
    for process in namespaces_of:
        _enter_namespaces_of(process)
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


if __name__ == "__main__":
    _run_one_rank(*sys.argv[1:])
