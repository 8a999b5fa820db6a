"""Whether it is rank 0's store that listens where the ranks of a run are to meet."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from re2tal.distributed import World

ANSWER_SECONDS = 30.0
"""A store that accepts a connection answers it within milliseconds; a busy machine may take seconds."""


def refuse_foreign_listener(world: World, *, timeout_seconds: float) -> None:
    """Returns when rank 0's store answers. ConnectionError where something else listens in its place, or nothing does.

    Rank 0 itself sees that its port is taken. The others would wait for an answer without a limit: torch's time limit
    does not hold for a connection that was accepted.
    """
    where = f"{world.master_addr}:{world.master_port}"
    deadline = time.monotonic() + timeout_seconds
    while not _accepts(world):
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"rank {world.rank} of {world.world_size} could not reach rank 0 at {where} for {timeout_seconds:g} s; "
                "check that rank 0 runs, MASTER_ADDR, MASTER_PORT and the firewall"
            )
        time.sleep(0.2)
    answers: list[bool] = []
    # In a thread that may be left behind: its call may never return.
    asking = threading.Thread(target=_ask, args=(world, answers), daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS + 5.0)
    if not answers:
        raise ConnectionError(
            f"something listens at {where}, but it is not rank 0 of this run, says rank {world.rank} of "
            f"{world.world_size}; choose another port (deepspeed --master_port, torchrun --master-port, MASTER_PORT)"
        )


def _accepts(world: World) -> bool:
    try:
        # 5 seconds: a firewall that drops packets gives no answer at all.
        socket.create_connection((world.master_addr, world.master_port), timeout=5.0).close()
    except OSError:
        return False
    return True


def _ask(world: World, answers: list[bool]) -> None:
    try:
        store = dist.TCPStore(
            world.master_addr,
            world.master_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=ANSWER_SECONDS),
        )
        answers.append(store.check(["re2tal"]) is not None)
    except (dist.DistError, RuntimeError):
        return
