"""The budget that "auto" stands for: most of the free memory of a device, read before anything is on it.

Each rank has its own card. On a CPU the ranks of a machine share its memory, or the limit of their control group, with
the decoders that feed them.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from re2tal.distributed import together

SHARE_OF_A_CARD = 0.92
"""Allocators round up, and kernels take workspaces."""
SHARE_OF_A_HOST = 0.7
"""Decoders, batches on their way and the interpreters take the rest."""
AVAILABLE = Path("/proc/meminfo")
OWN_GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
"""Control groups of version 2. Those of version 1 that limit memory are in its folder `memory`."""


def free_memory(device: torch.device, *, sharers: int = 1) -> int:
    """Bytes of `device` that a rank's step may take now; a CPU's are divided by `sharers`, the ranks on this machine.

    Raises ValueError for a CPU whose system does not say what is free.
    """
    if device.type == "cpu":
        return int(_free_on_host() * SHARE_OF_A_HOST) // sharers
    return int(torch.get_device_module(device).mem_get_info(device)[0] * SHARE_OF_A_CARD)


def free_on_all_ranks(device: torch.device) -> int:
    """Every rank calls this: the least that any of them may take."""
    # Ranks that call their host by one name share its memory, however they were launched.
    ranks = Counter(together(socket.gethostname))
    return min(together(partial(free_memory, device, sharers=ranks[socket.gethostname()])))


def _free_on_host() -> int:
    """Bytes that processes can get without swapping, within the limits of the control groups that they are in."""
    try:
        lines = dict(line.split(":", 1) for line in AVAILABLE.read_text().splitlines())
        # MemAvailable is in kibibytes, and counts what the kernel can give back.
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f'engine.memory_budget_gb is "auto", but {AVAILABLE} does not say how much memory is available here '
            f"({type(error).__name__}: {error}); give a number of gigabytes"
        ) from None
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Bytes left below the limit of each control group that has one; its page cache counts as free."""
    if not OWN_GROUP.is_file():  # a kernel without control groups
        return
    for line in OWN_GROUP.read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if not controllers:
            yield from _left_below(GROUPS, own, limit="memory.max", used="memory.current", cached="inactive_file")
        elif "memory" in controllers.split(","):
            names = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes"}
            yield from _left_below(GROUPS / "memory", own, **names, cached="total_inactive_file")


def _left_below(root: Path, own: str, *, limit: str, used: str, cached: str) -> Iterator[int]:
    """The same for the group `own` and those around it, below `root`; the others are names of files and of a value."""
    inner = root / own.lstrip("/")
    # A parent's limit holds for all of its children together. A container sees its own group as the root.
    for group in [inner, *inner.parents]:
        if not (group / limit).is_file() or (most := (group / limit).read_text().strip()) == "max":
            continue
        # What is used counts the page cache, of which the kernel can drop this part.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        yield max(0, int(most) - int((group / used).read_text()) + int(stat.get(cached, 0)))
