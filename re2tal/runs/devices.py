"""The device and the ranks of a command that needs no engine: each does its share, and the first one writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from re2tal.distributed import World, resolve_world

LONGEST_WAIT = timedelta(days=30)
"""The others wait for the rank with the longest videos."""


def default_device() -> torch.device:
    """The accelerator, if there is one; a build of torch for CUDA names it on machines without a GPU too."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def named_device(name: torch.device | str | None) -> torch.device:
    """The device of this name, the default one without. ValueError where this machine has none such."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch has no one class for this: a build without CUDA fails an assertion.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {str(name)!r}, which cannot be had here ({str(error).partition(chr(10))[0]}); give cpu, cuda, "
            "cuda:1, ..., or leave it out"
        ) from None
    return device


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
    return chosen if device is not None or chosen.type == "cpu" else torch.device(chosen.type, world.device_index)
