"""The ranks of a command that needs no engine: each does its share, and the first one writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from re2tal.distributed import World, resolve_world
from re2tal.runs.devices import named_device

LONGEST_WAIT = timedelta(days=30)
"""The others wait for the rank with the longest videos."""


@contextmanager
def joined_ranks() -> Iterator[World]:
    """Every rank enters this, as torchrun, deepspeed or srun started it; alone where nothing did."""
    world = resolve_world(os.environ)
    # A caller that has joined the ranks keeps its group.
    if world.world_size == 1 or dist.is_initialized():
        yield world
        return
    # PyTorch's rendezvous reads these, and srun sets others.
    world.export()
    # gloo, as these ranks only exchange what they found, and may have no accelerator.
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def device_of(world: World, device: str | None) -> torch.device:
    """The device that was asked for, or this rank's accelerator."""
    chosen = named_device(device)
    return chosen if device or chosen.type == "cpu" else torch.device(chosen.type, world.device_index)
