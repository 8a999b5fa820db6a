"""The process group of a run: joining it and leaving it."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from re2tal.distributed import World, named_host
from re2tal.training.config import EngineConfig
from re2tal.training.deepspeed_import import deepspeed, deepspeed_logger
from re2tal.training.rendezvous import refuse_foreign_listener

# Taken on import, before any engine of DeepSpeed can have replaced it.
TORCH_LINEAR = torch.nn.functional.linear

MOST_SECONDS_OF_GLOO = 10.0
GLOO_THREAD = "pt_gloo_runloop"
"""The name torch gives the threads that do gloo's collectives."""

SWITCHES = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
"""Linux's names for the number of times that a thread was switched out; some sandboxes do not report them."""


def join(world: World, config: EngineConfig) -> torch.device:
    """Every rank calls this once: joins the process group and returns the device to train on.

    Raises ConnectionError, naming the address, when the others cannot be reached in time or the port is taken.
    """
    for name in world.variables():
        _environment.setdefault(name, os.environ.get(name))
    world.export()
    # DeepSpeed would compile a shared-memory op for CPU groups: a compiler for something gloo does anyway, and a build
    # killed half-way leaves a lock that every later start waits on for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.device(deepspeed.get_accelerator().device_name(world.device_index))
        torch.accelerator.set_device_index(world.device_index)
    # Rank 0 serves the store, so the others alone can meet a stranger at its port.
    if world.rank > 0 and not dist.is_initialized():
        refuse_foreign_listener(world, timeout_seconds=60 * config.timeout_minutes)
    try:
        # All five variables are set above; without `auto_mpi_discovery` DeepSpeed does not ask MPI for them.
        deepspeed.init_distributed(
            timeout=timedelta(minutes=config.timeout_minutes), auto_mpi_discovery=False, verbose=False
        )
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(_why_not_joined(world, str(error).splitlines()[0])) from error
    return device


def _why_not_joined(world: World, reason: str) -> str:
    who = f"rank {world.rank} of {world.world_size} (host {named_host()})"
    # Ranks met, or had no need to, and then found no way to each other: the port is not at fault.
    if "Unable to find address" in reason or "connectFullMesh" in reason or "gloo" in reason:
        chosen = os.environ.get("GLOO_SOCKET_IFNAME")
        return (
            f"{who} has no network interface to the others ({reason}); GLOO_SOCKET_IFNAME "
            + (f"names {chosen!r}" if chosen else "is not set, and the host's own name leads nowhere")
            + f"; set it to one of {[name for _, name in socket.if_nameindex()]}, the one that reaches the other hosts"
        )
    return (
        f"{who} could not meet the others at {world.master_addr}:{world.master_port} ({reason}). If the port is taken, "
        "choose another (deepspeed --master_port, torchrun --master-port); across machines check MASTER_ADDR and set "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


_environment: dict[str, str | None] = {}
"""What `join` found where it put variables of its own."""


def leave() -> None:
    """Every rank calls this at the end: leaves the process group, if there is one. The interpreter may end after it."""
    # A process that this one starts later is no rank of the run, and must not look for it at its port.
    while _environment:
        name, value = _environment.popitem()
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    # ZeRO-3 replaces `F.linear` in the whole process for good. Networks that this process rewires later would be slower
    # and keep more: the reversible engine recognizes only torch's.
    torch.nn.functional.linear = TORCH_LINEAR
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
        _let_workers_rest()


def _let_workers_rest() -> None:
    """Returns when no thread of gloo has anything left to do.

    A gloo thread releases the tensors of a collective a moment after the caller has its result, and needs the
    interpreter for it. On a busy machine the interpreter may have ended by then, and torch aborts the process
    (pytorch#190489). Destroying the groups does not end the threads: DeepSpeed's engines keep references to them.
    """
    deadline = time.monotonic() + MOST_SECONDS_OF_GLOO
    before = None
    # Idle: asleep before and after a pause, and not switched out in between, though the interpreter was free.
    while (now := _gloo_threads()) != before or any(state != "S" for state, *_ in now.values()):
        if time.monotonic() > deadline:
            deepspeed_logger.warning(f"gloo is still busy {MOST_SECONDS_OF_GLOO:g} s after the last collective")
            return
        before = now
        time.sleep(0.01)


def _gloo_threads() -> dict[str, tuple[str, ...]]:
    """Thread -> its state and how often it has been switched out; empty where the system does not tell."""
    threads = {}
    for task in Path("/proc/self/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended: all the better
            lines = (task / "status").read_text("utf-8").splitlines()
            status = dict(line.partition(":\t")[::2] for line in lines)
            if status["Name"] == GLOO_THREAD:
                threads[task.name] = (status["State"][0], *(status.get(kind, "") for kind in SWITCHES))
    return threads
